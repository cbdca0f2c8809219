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
mod testing {
    use std::sync::{Arc, mpsc};

    use super::link::{DeviceLink, WakeFd};
    use super::{Mode, NegotiationWatch, SessionConfig};
    use crate::device::{Command, DeviceHandle};

    /// A link to a device that is whoever holds the receiver.
    pub fn link() -> (Arc<DeviceLink>, Device) {
        let poll = mio::Poll::new().unwrap();
        let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
        let (sender, receiver) = mpsc::channel();
        let config = SessionConfig {
            guest: "g".into(),
            cid: 3,
            socket: "/x".into(),
            mode: Mode::Server,
        };
        let link = DeviceLink::new(
            "g".into(),
            DeviceHandle::new(sender, waker),
            NegotiationWatch::new(&config),
            Arc::new(WakeFd::new().unwrap()),
        );
        (
            Arc::new(link),
            Device {
                commands: receiver,
                _poll: poll,
            },
        )
    }

    pub struct Device {
        pub commands: mpsc::Receiver<Command>,
        _poll: mio::Poll,
    }
}
