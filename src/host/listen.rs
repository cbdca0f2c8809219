//! Listeners of inbound rules.

use super::HostStream;

/// A client of an inbound listener that wants to reach a guest port.
#[derive(Debug)]
pub struct Incoming {
    /// Index of the inbound rule in the guest's configuration.
    pub rule: usize,
    /// Port in the guest.
    pub port: u32,
    /// The client's socket.
    pub stream: HostStream,
    /// Bytes the client already sent that belong to the guest (they came with the CONNECT line).
    pub preface: Vec<u8>,
    /// Whether the client waits for `OK <port>\n`.
    pub wants_ok: bool,
    /// The client, for the log: an address, or a unix path.
    pub peer: String,
}
