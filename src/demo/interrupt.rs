//! Ctrl-C and SIGTERM as a flag to look at and a condition to wait for, so that the demo cleans up.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

use super::Error;

/// Whether somebody wants the demo to end.
#[derive(Clone, Default, Debug)]
pub(super) struct Interrupt {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl Interrupt {
    /// Takes SIGINT and SIGTERM for the rest of the process's life.
    pub(super) fn install() -> Result<Interrupt, Error> {
        let interrupt = Interrupt::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::io("start the signal runtime"))?;
        let (mut int, mut term) = {
            let _in_runtime = runtime.enter();
            let take = |kind| signal(kind).map_err(Error::io("take over a signal"));
            (take(SignalKind::interrupt())?, take(SignalKind::terminate())?)
        };
        let raise = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = int.recv() => {}
                        _ = term.recv() => {}
                    }
                });
                raise.raise();
            })
            .map_err(Error::io("start the signal thread"))?;
        Ok(interrupt)
    }

    /// Says that the demo should end.
    pub(super) fn raise(&self) {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.state.1.notify_all();
    }

    /// An error once the demo should end.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.raised() {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Whether the demo should end.
    pub(super) fn raised(&self) -> bool {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the demo should end.
    pub(super) fn wait(&self) {
        let mut raised = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*raised {
            raised = self.state.1.wait(raised).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
