//! One connected host socket, non-blocking.

use socket2::Socket;

/// A connected, non-blocking host socket (TCP or unix).
#[derive(Debug)]
pub struct HostStream {
    socket: Socket,
}

impl HostStream {
    /// Takes a connected socket and makes it non-blocking.
    pub fn new(socket: Socket) -> std::io::Result<HostStream> {
        socket.set_nonblocking(true)?;
        Ok(HostStream { socket })
    }
}
