//! How a session ended, put together from what the threads involved have seen of it.

use tracing::error;
use vhost_user_backend::Error as DaemonError;

use super::gate::Gate;
use super::link::{DeviceLink, Failure};
use super::message::display_name;
use super::negotiation::SessionError;
use super::relay::RelayEnd;
use super::wire::WireError;
use crate::sys::unwind::{self, Panic};

/// Why pumping stopped.
pub(super) enum PumpEnd {
    Shutdown,
    Failure(End),
    /// The session thread has panicked in it.
    Panicked(Panic),
    Relay(RelayEnd),
}

/// How a session ended, before it is told to anybody.
pub(super) struct End {
    pub(super) error: Option<SessionError>,
    /// The request that is counted as failed, unless its answer was.
    pub(super) request: Option<u32>,
    pub(super) reason: &'static str,
    pub(super) detail: String,
}

impl End {
    fn fine(reason: &'static str, detail: &str) -> End {
        End {
            error: None,
            request: None,
            reason,
            detail: detail.into(),
        }
    }

    pub(super) fn of(failure: Failure) -> End {
        End::error(failure.kind, failure.detail)
    }

    fn unknown() -> End {
        End::error(SessionError::Io, String::new())
    }

    pub(super) fn error(error: SessionError, detail: String) -> End {
        End {
            error: Some(error),
            request: None,
            reason: error.label(),
            detail,
        }
    }

    /// The session thread has panicked.
    pub(super) fn panicked(guest: &str, panic: &Panic) -> End {
        let detail = format!("the session thread {panic}");
        error!(guest, detail, "contained a panic");
        End::error(SessionError::Panic, detail)
    }

    /// Puts together why a session ended from what the threads involved have seen of it.
    pub(super) fn explain(
        guest: &str,
        end: PumpEnd,
        outcome: Result<(), DaemonError>,
        gate: &Gate,
        link: &DeviceLink,
        ran: bool,
    ) -> End {
        if let Err(DaemonError::WaitDaemon(panic)) = &outcome {
            let detail = format!(
                "the protocol handler panicked{}: {}",
                at(gate),
                unwind::text(panic.as_ref())
            );
            error!(guest, detail, "contained a panic");
            return End {
                request: gate.culprit().map(|culprit| culprit.request),
                ..End::error(SessionError::Panic, detail)
            };
        }
        match end {
            PumpEnd::Shutdown => End::fine("shutdown", "the sidecar ends"),
            PumpEnd::Failure(end) => end,
            PumpEnd::Panicked(panic) => End::panicked(guest, &panic),
            PumpEnd::Relay(RelayEnd::VmmClosed) if ran => End::error(
                SessionError::PeerClosed,
                "the VMM closed the connection while rings were running".into(),
            ),
            PumpEnd::Relay(RelayEnd::VmmClosed) => End::fine("vmm_closed", "the VMM closed the connection"),
            PumpEnd::Relay(RelayEnd::Vmm(WireError::Io(error))) => {
                End::error(SessionError::Io, format!("the VMM's socket: {error}"))
            }
            PumpEnd::Relay(RelayEnd::Vmm(WireError::DescriptorsLost)) => {
                End::error(SessionError::Io, WireError::DescriptorsLost.to_string())
            }
            PumpEnd::Relay(RelayEnd::Vmm(error)) => End::error(SessionError::Protocol, error.to_string()),
            PumpEnd::Relay(RelayEnd::Refused { request, reason }) => End::error(
                SessionError::of_request(request),
                format!("{}: {reason}", display_name(request)),
            ),
            PumpEnd::Relay(RelayEnd::Crate(error)) => End::error(
                SessionError::Io,
                format!("the protocol handler's socket: {error}"),
            ),
            // The device failed, and the crate ended because of it.
            PumpEnd::Relay(RelayEnd::CrateClosed) if link.failure().is_some() => {
                link.failure().map_or_else(End::unknown, End::of)
            }
            PumpEnd::Relay(RelayEnd::CrateClosed) => {
                let said = match outcome {
                    Ok(()) => "the connection was ended".to_owned(),
                    Err(error) => error.to_string(),
                };
                match gate.culprit() {
                    Some(culprit) => End {
                        request: (!culprit.answered).then_some(culprit.request),
                        ..End::error(
                            SessionError::of_request(culprit.request),
                            format!("{culprit} ({said})"),
                        )
                    },
                    None => End::error(SessionError::Protocol, said),
                }
            }
        }
    }
}

/// `, serving SET_VRING_ADDR`.
fn at(gate: &Gate) -> String {
    gate.culprit()
        .map_or_else(String::new, |culprit| format!(", serving {culprit}"))
}
