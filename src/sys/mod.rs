//! System calls behind safe functions, and the only place of unsafe code.
//!
//! Each module here is small and safe on the outside; a block does one thing and says why it is sound.

#[allow(unsafe_code)]
pub mod iovec;
#[allow(unsafe_code)]
pub mod packet;
#[allow(unsafe_code)]
pub mod peercred;
pub mod readiness;
pub mod unix_socket;
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
