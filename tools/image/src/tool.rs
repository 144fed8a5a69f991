//! Programs that do what no library does: `mke2fs`, `mmdebstrap`, `apt-get`, `dpkg-deb`, `depmod`.
//!
//! A program that is missing is named with the package that has it; one that fails is quoted, in its last lines.

use std::ffi::OsStr;
use std::io;
use std::process::{Command, ExitStatus, Stdio};

/// How much of a failed program's messages is quoted.
const QUOTED_LINES: usize = 12;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("`{program}` is not installed (Debian package {package})")]
    Missing {
        /// The program.
        program: String,
        /// The package that has it.
        package: &'static str,
    },
    /// It could not be started.
    #[error("cannot start `{program}`")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("`{program}` failed ({status}):\n{messages}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it wrote to standard error.
        messages: String,
    },
}

/// A program with arguments.
pub struct Tool {
    command: Command,
    program: String,
    package: &'static str,
}

impl Tool {
    /// The program, and the Debian package that has it.
    pub fn new(program: &str, package: &'static str) -> Self {
        let mut command = Command::new(program);
        // Messages that we read, and no questions.
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        // mke2fs and depmod are in sbin, which users' paths leave out.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"));
        Self { command, program: program.to_owned(), package }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets where it runs.
    #[must_use]
    pub fn current_dir(mut self, directory: &std::path::Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Runs it and gives what it wrote to standard output.
    ///
    /// # Errors
    /// [`ToolError`].
    pub fn run(mut self) -> Result<Vec<u8>, ToolError> {
        let output = self.command.output().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                ToolError::Missing { program: self.program.clone(), package: self.package }
            }
            _ => ToolError::Start { program: self.program.clone(), source },
        })?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let messages = lines.get(lines.len().saturating_sub(QUOTED_LINES)..).unwrap_or_default().join("\n");
        Err(ToolError::Failed { program: self.program, status: output.status, messages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_messages_and_missing_programs() {
        assert_eq!(Tool::new("echo", "coreutils").arg("x").run().unwrap(), b"x\n");
        let failed = Tool::new("sh", "dash").args(["-c", "echo why >&2; exit 3"]).run().unwrap_err();
        assert!(
            matches!(&failed, ToolError::Failed { messages, status, .. } if messages == "why" && status.code() == Some(3))
        );
        let missing = Tool::new("no-such-program", "nothing").run().unwrap_err();
        assert!(matches!(missing, ToolError::Missing { package: "nothing", .. }));
    }
}
