//! What users get wrong: each is refused with the reason and the remedy, and nothing of the attempt stays.

use std::io::Write;

use anyhow::{Result, bail};
use tests::{Ground, tidy};

/// Exit codes of `mashines`: wrong usage, not found, a host refused.
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 5;

#[test]
fn a_launch_that_cannot_be_is_refused_and_leaves_nothing() -> Result<()> {
    let Some(ground) = Ground::up("input") else { return Ok(()) };
    let mut text = tempfile::NamedTempFile::new()?;
    writeln!(text, "this is no kernel, but a text that is long enough to be looked at")?;
    let mut elf = tempfile::NamedTempFile::new()?;
    // An ELF file, but not one that can be entered as PVH asks for.
    std::io::copy(&mut std::fs::File::open("/proc/self/exe")?, &mut elf)?;
    let (text, elf) = (text.path().display().to_string(), elf.path().display().to_string());

    let attempts: [(&[&str], i32, &[&str]); 8] = [
        (&["--kernel", &text], REFUSED, &["kernel"]),
        (&["--kernel", &elf], REFUSED, &["kernel"]),
        (&["--kernel", "/nowhere/vmlinux"], REFUSED, &["/nowhere/vmlinux"]),
        (&["--memory", "0"], USAGE, &["memory"]),
        (&["--memory", "900G"], REFUSED, &["RAM"]),
        (&["--vcpu", "0"], USAGE, &["vCPU"]),
        (&["--host", "host-z"], NOT_FOUND, &["host-z"]),
        (&["--image", "nothing-of-that-name"], NOT_FOUND, &["nothing-of-that-name"]),
    ];
    let mut wrong = Vec::new();
    for (number, (more, code, names)) in attempts.into_iter().enumerate() {
        let name = format!("wrong-{number}");
        let memory: &[&str] = if more.contains(&"--memory") { &[] } else { &["--memory", "64M"] };
        let words = [&["launch", "--name", &name], more, memory].concat();
        let (exit, said) = ground.refused(&words)?;
        if exit != code || names.iter().any(|name| !said.contains(name)) {
            wrong.push(format!(
                "`{}`: expected exit code {code} and {names:?}, got {exit}: {said}",
                words.join(" ")
            ));
        }
        println!("{}", said.trim());
        // What its host refused stays in the list, for its user to see why.
        if let Ok(machine) = ground.machine(&name) {
            ground.ask::<serde_json::Value>(&["rm", machine.name.as_str()])?;
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    tidy::nothing_is_held(&ground)?;
    ground.finish()
}
