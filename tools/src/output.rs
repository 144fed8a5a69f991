//! Data on standard output: JSON, or tables for people.

use std::io::Write as _;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;

use crate::exit::Failure;

/// Writes to standard output. A reader that has had enough (`| head`) is no failure.
///
/// # Errors
/// When standard output cannot be written.
pub fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::local("writing to standard output", error, "make room where it goes")),
    }
}

/// Waits until nobody can read standard output any more, as after `| head`; for ever where that cannot be seen. For commands that follow
/// something, which may not write again for hours.
pub async fn unread() {
    let (to, gone) = tokio::sync::oneshot::channel();
    // Not an `AsyncFd`: what standard output is decides whether epoll takes it, and it would have to be made non-blocking. The
    // thread ends with the process.
    std::thread::spawn(move || {
        let out = std::io::stdout();
        let mut wait = [PollFd::new(&out, PollFlags::empty())];
        while let Err(Errno::INTR) = poll(&mut wait, None) {}
        if wait[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            let _ = to.send(());
        }
    });
    if gone.await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Writes one line.
///
/// # Errors
/// As [`write`].
pub fn line(text: &str) -> Result<(), Failure> {
    write(format!("{text}\n").as_bytes())
}

/// Writes one value as a line of JSON.
///
/// # Errors
/// As [`write`].
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::local("writing JSON", error, "report this as a defect"))?;
    line(&text)
}

/// Writes rows under their heads, each column as wide as its widest cell.
///
/// # Errors
/// As [`write`].
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    write(render(heads, rows).as_bytes())
}

/// Writes names and values, one pair a line.
///
/// # Errors
/// As [`write`].
pub fn pairs(pairs: &[(&str, String)]) -> Result<(), Failure> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: String = pairs.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect();
    write(lines.as_bytes())
}

fn render(heads: &[&str], rows: &[Vec<String>]) -> String {
    let heads: Vec<String> = heads.iter().map(|&head| head.to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&heads]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    for row in [&heads].into_iter().chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "longer".to_owned()], vec!["bcd".to_owned(), String::new()]];
        assert_eq!(render(&["NAME", "X"], &rows), "NAME  X\na     longer\nbcd\n");
    }
}
