//! System calls behind safe functions, and the only place of unsafe code.
//!
//! Each module here is small and safe on the outside; a block does one thing and says why it is sound. What belongs to the
//! process as a whole is here as well: its SIGBUS handler and its panic hook.

#[allow(unsafe_code)]
pub mod iovec;
#[allow(unsafe_code)]
pub mod packet;
#[allow(unsafe_code)]
pub mod peercred;
pub mod readiness;
#[allow(unsafe_code)]
pub mod sigbus;
#[allow(unsafe_code)]
pub mod sigsys;
pub mod unix_socket;
pub mod unwind;
#[allow(unsafe_code)]
pub mod vectored;

use std::io;

/// Calls until it is not interrupted by a signal; a negative result is the error that errno has.
fn retry_interrupted(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
