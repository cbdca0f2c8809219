//! Init of the test guest: mounts, loads the vsock modules, then does what the control line says.
//!
//! The control line is the second serial port. The first thing written to it is `ready RELEASE`, after every boot; from then
//! on each line is a command that gets one line in answer ([`command`]). A failure to start is written to the console and
//! ends init, which makes the kernel panic: the test sees both in the console's log.

mod command;
#[path = "../../../src/demo/vm/pattern.rs"]
mod pattern;
mod program;
mod script;
mod sys;
#[path = "../../../src/demo/vm/text.rs"]
mod text;

use std::io::{self, BufRead, BufReader, Write};
use std::sync::Arc;

fn main() -> io::Result<()> {
    sys::mount_all()?;
    sys::load_modules()?;
    let control = sys::open_raw("/dev/ttyS1")?;
    let mut answers = control.try_clone()?;
    writeln!(answers, "ready {}", sys::release())?;
    let guest = Arc::new(command::Guest::default());
    for line in BufReader::new(control).lines() {
        let answer = guest.answer(&line?);
        // One write a line: a serial port has no other framing.
        answers.write_all(format!("{answer}\n").as_bytes())?;
    }
    Err(io::Error::other("the control line ended"))
}
