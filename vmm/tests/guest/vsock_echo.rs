//! A program for the guest: echoes on a vsock port, and writes a line to `/ends` for each connection that has ended. Compiled by the test
//! that uses it, statically and without crates.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;

#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn bind(fd: i32, address: *const Address, length: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, length: *mut u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
}

fn main() {
    let address = Address { family: 40, reserved: 0, port: 1024, cid: u32::MAX, zero: [0; 4] };
    // SAFETY: a plain system call.
    let listener = unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) };
    assert!(listener >= 0, "no vsock");
    // SAFETY: `address` is a `sockaddr_vm` of 16 bytes.
    assert_eq!(unsafe { bind(listener, &raw const address, 16) }, 0);
    // SAFETY: a plain system call.
    assert_eq!(unsafe { listen(listener, 64) }, 0);
    println!("LISTENING");
    loop {
        // SAFETY: null asks for no address.
        let fd = unsafe { accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) };
        if fd >= 0 {
            std::thread::spawn(move || echo(fd));
        }
    }
}

fn echo(fd: i32) {
    // SAFETY: accepted above, and nobody else's.
    let mut stream = unsafe { File::from_raw_fd(fd) };
    let mut buffer = vec![0; 64 << 10];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "end of file".to_owned(),
            Ok(bytes) => {
                if let Err(error) = stream.write_all(&buffer[..bytes]) {
                    break error.to_string();
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    // SAFETY: a plain system call on a descriptor that is open until `stream` is dropped.
    unsafe { shutdown(fd, SHUT_WR) };
    let mut log = File::options().append(true).create(true).open("/ends").expect("/ends");
    writeln!(log, "{end}").expect("/ends");
}
