//! The session with the VMM.

mod backend;
mod endpoint;
pub mod features;
pub mod gate;
mod link;
pub mod message;
pub mod negotiation;
pub mod private_socket;
pub mod relay;
mod session;
mod vring;
pub mod wire;

pub use endpoint::{BindError, Endpoint, Mode, SessionConfig};
pub use features::Features;
pub use negotiation::{Negotiation, NegotiationWatch, SessionError, SessionState};
pub use session::{Session, SessionHandle};

#[cfg(test)]
mod testing;
