//! Reaching the target of an outbound rule.

use std::time::Duration;

use super::HostStream;

/// Why a target could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// ECONNREFUSED, or a unix socket that nobody serves (ENOENT included).
    #[error("{target} refused the connection: {source}")]
    Refused {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("{target} did not answer within {after:?}")]
    TimedOut {
        /// What was dialled.
        target: String,
        /// The time that was given.
        after: Duration,
    },
    /// The name could not be resolved.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's error.
        source: std::io::Error,
    },
    /// No route, or another error of connect().
    #[error("cannot reach {target}: {source}")]
    Unreachable {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The process is out of file descriptors or memory.
    #[error("no resources to reach {target}: {source}")]
    Resources {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Outcome of a dial.
pub type DialResult = Result<HostStream, DialError>;
