//! The test guest: a bare-metal program that is its own kernel. README.md is its contract.
//!
//! Everything runs in ring 3 on one address space without protection; ring 0 (`boot.s`) only takes interrupts, halts
//! and writes model-specific registers. vCPU 0 turns one loop over the network, the commands and its share of the work;
//! further vCPUs only work. Whatever goes wrong ends in `power::fatal`, which says so on the serial line.
#![no_std]
#![no_main]

mod apic;
mod clock;
mod commands;
mod cpu;
mod kvmclock;
mod machine;
mod mem;
mod memory;
mod net;
mod observe;
mod once;
mod power;
mod serial;
mod services;
mod smp;
mod trap;
mod virtio;

use apic::Apic;
use clock::Clock;
use guest_core::cmdline::Config;
use guest_core::command::Mode;
use guest_core::page::mix;
use guest_core::text::OrDash;
use kvmclock::KvmClock;
use machine::{Boot, End, Machine};
use memory::frames::Frames;
use memory::managed::Managed;
use memory::map::BootInfo;
use memory::orders::REPORTS;
use memory::worker::Worker;
use net::Stack;
use observe::Observer;
use once::Once;
use services::{SOCKETS, Services};
use smoltcp::iface::SocketStorage;
use smp::Crew;
use virtio::blk::Blk;
use virtio::mmio::{Device, Kind};
use virtio::net::Net;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

/// How often silent connections are looked for.
const MAKE_ROOM_EVERY_US: u64 = 1_000_000;

static MANAGED: Once<Managed> = Once::new();

/// The devices that were found.
#[derive(Default)]
struct Devices {
    net: Option<Device>,
    blk: Option<Device>,
    rng: Option<Device>,
}

/// Where `boot.s` goes on, in ring 3 on vCPU 0.
#[unsafe(no_mangle)]
extern "C" fn rust_main(start_info: u32) -> ! {
    let boot_tsc = cpu::tsc();
    trap::init();
    let info = BootInfo::read(start_info);
    let config = Config::parse(info.command_line.as_str());
    let mut frames = Frames::new(info.ranges);
    let kvmclock = KvmClock::start(&mut frames);
    let clock = Clock::new(boot_tsc, config.tsc_khz, kvmclock.as_ref());
    let apic = Apic::new(&clock);

    let devices = probe(&config);
    let from_device = devices.rng.and_then(|device| virtio::rng::seed(&device, &mut frames, &clock));
    let seed = from_device.unwrap_or_else(|| mix(cpu::tsc()));
    let net = devices.net.and_then(|device| Net::start(device, &mut frames));
    let blk = devices.blk.and_then(|device| Blk::start(device, &mut frames, seed, clock.hz));
    let mut storage: [SocketStorage<'_>; SOCKETS] = Default::default();
    let mut network = net.map(|net| {
        let mut stack = Stack::new(net, &config, seed, &mut storage, clock.uptime_us());
        let services = Services::new(&mut stack, &mut frames);
        (stack, services)
    });

    let observer = Observer::new(apic, &config, kvmclock.is_some(), seed);
    let vcpus = smp::start(config.vcpus, &mut frames, apic, &clock);
    let managed = MANAGED.set(Managed::new(frames, seed));
    let boot = Boot {
        config,
        seed: (seed, from_device.is_some()),
        ram_bytes: info.ram_bytes,
        clock,
        kvmclock,
        managed,
        vcpus,
        blk,
        observer,
    };
    let mut machine = Machine::new(boot);
    let mut worker = Worker::new(managed, &REPORTS[0], 0, vcpus, clock.hz);
    smp::set_mode(machine.mode);
    smp::go(Crew { managed, clock, vcpus });
    if let Some((stack, _)) = &mut network {
        stack.set_interrupts(machine.mode != Mode::Spin);
    }
    announce(&mut machine, network.is_some());
    loop {
        turn(&mut machine, network.as_mut(), &mut worker, &apic);
    }
}

/// One turn of the loop on vCPU 0.
fn turn(
    machine: &mut Machine,
    network: Option<&mut (Stack<'_>, Services)>,
    worker: &mut Worker,
    apic: &Apic,
) {
    let now_us = machine.turn();
    let mut busy = worker.step();
    let finished = machine.finished();
    let (blk_busy, blk_finished) = machine.step_blk();
    busy |= blk_busy;
    if let Some((stack, services)) = network {
        if let Some((task, tally, us)) = finished {
            let reply = commands::task_reply(task, &tally, us);
            services.task_done(&mut stack.sockets, machine, &reply);
        }
        if let Some((_, tally, us)) = blk_finished {
            let reply = commands::blk_reply(&tally, us);
            services.task_done(&mut stack.sockets, machine, &reply);
        }
        let mode_before = machine.mode;
        if stack.ingress(now_us) {
            services.serve(&mut stack.sockets, machine);
            busy = true;
        }
        if now_us >= machine.make_room_at {
            machine.make_room_at = now_us + MAKE_ROOM_EVERY_US;
            services.make_room(&mut stack.sockets, now_us);
        }
        busy |= stack.egress(now_us);
        machine.net_frames = stack.frames();
        if machine.mode != mode_before {
            stack.set_interrupts(machine.mode != Mode::Spin);
            smp::set_mode(machine.mode);
        }
    }
    busy |= machine.serial.send_one();
    if let Some((at_us, end)) = machine.end
        && now_us >= at_us
    {
        machine.serial.flush();
        match end {
            End::Off => power::off(),
            End::Panic => panic!("asked for"),
        }
    }
    if !busy && machine.mode != Mode::Spin {
        apic.idle(machine.mode.halt_us());
    }
}

/// Looks for the devices the command line names; the first of each kind is used.
fn probe(config: &Config) -> Devices {
    let mut devices = Devices::default();
    for (window, index) in config.devices().zip(0u8..) {
        let Some((kind, device)) = Device::probe(window, index) else { continue };
        let place = match kind {
            Kind::Net => &mut devices.net,
            Kind::Rng => &mut devices.rng,
            Kind::Blk => &mut devices.blk,
        };
        place.get_or_insert(device);
    }
    devices
}

/// Tells on the serial line that the guest is up.
fn announce(machine: &mut Machine, network: bool) {
    let Machine { config, serial, ram_bytes, vcpus, .. } = machine;
    if *vcpus < config.vcpus {
        serial.line(format_args!("only {vcpus} of {} vcpus started", config.vcpus));
    }
    if config.rejected > 0 {
        serial.line(format_args!("{} words of the command line make no sense", config.rejected));
    }
    serial.line(format_args!(
        "ready ram={ram_bytes} vcpus={vcpus} id={} ip4={} ip6={}{}",
        config.id.as_str(),
        OrDash(config.ip4),
        OrDash(config.ip6),
        if network { "" } else { " no-network" },
    ));
}
