//! What other threads ask for, carried out between turns.

use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::Instant;

use mio::Interest;
use mio::unix::SourceFd;
use tracing::{debug, warn};

use crate::guest::{Ring, RingParts};
use crate::metrics::QUEUE_LABELS;

use super::handle::Command;
use super::{Device, QUEUES, RX, RunningRing, TX, budget, token};

impl Device {
    /// Takes commands until one of them is to stop; whether some are left.
    pub(super) fn handle_commands(&mut self, now: Instant) -> ControlFlow<(), bool> {
        for _ in 0..budget::COMMANDS {
            match self.inbox.try_recv() {
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                    self.switchboard.close_all(now);
                    return ControlFlow::Break(());
                }
                Ok(command) => self.handle_command(now, command),
                Err(mpsc::TryRecvError::Empty) => return ControlFlow::Continue(false),
            }
        }
        ControlFlow::Continue(true)
    }

    /// Answers may find nobody: a session that was shut down no longer waits for them.
    fn handle_command(&mut self, now: Instant, command: Command) {
        match command {
            Command::SetMemory { ram, done } => {
                self.ram = ram;
                let _ = done.send(());
            }
            Command::StartQueue { index, parts, done } => {
                let _ = done.send(self.start_queue(index, parts));
            }
            Command::StopQueue { index, pause, done } => {
                let position = self.take_queue(now, index).map(|ring| ring.position());
                if !pause {
                    self.forget_connections(now, index);
                }
                let _ = done.send(position);
            }
            Command::SetCall { index, call, done } => {
                if let Some(Some(running)) = self.rings.get_mut(index) {
                    running.ring.set_call(call);
                    // An interrupt may have gone to the old descriptor unseen; a needless one is harmless.
                    if let Err(error) = running.ring.signal() {
                        debug!(guest = %self.switchboard.name, %error, "cannot signal the new call descriptor");
                    }
                }
                let _ = done.send(());
            }
            Command::SetListener { done, .. }
            | Command::UpdateIotlb { done, .. }
            | Command::InvalidateIotlb { done, .. }
            | Command::FlushIotlb { done } => {
                let _ = done.send(());
            }
            Command::MissAnswered { .. } => {}
            Command::EndSession { done } => {
                for index in 0..QUEUES {
                    self.take_queue(now, index);
                    self.forget_connections(now, index);
                }
                self.switchboard.session_ended(now);
                self.ram = None;
                let _ = done.send(());
            }
            Command::Incoming(incoming) => self.switchboard.handle_incoming(now, incoming),
            Command::Dialed { token, result, took } => {
                self.switchboard.handle_dialed(now, token, result, took)
            }
            Command::Snapshot(reply) => {
                let _ = reply.send(self.snapshot(now));
            }
            Command::Ping(reply) => {
                let _ = reply.send(());
            }
            Command::Drain => self.switchboard.draining = true,
            // Taken by handle_commands.
            Command::Stop => {}
        }
    }

    fn start_queue(&mut self, index: usize, parts: RingParts) -> Result<(), String> {
        let queue = QUEUE_LABELS.get(index).copied().unwrap_or("?");
        let Some(slot) = self.rings.get_mut(index) else {
            return Err(format!("queue {index} does not exist, this device has {QUEUES}"));
        };
        if let Some(old) = slot.take() {
            let _ = self
                .poll
                .registry()
                .deregister(&mut SourceFd(&old.ring.kick().as_raw_fd()));
        }
        let ring = Ring::new(parts).map_err(|error| error.to_string())?;
        let Some(ram) = &self.ram else {
            return Err("the ring was started before the VMM shared memory".into());
        };
        ring.check(ram).map_err(|error| error.to_string())?;
        self.poll
            .registry()
            .register(
                &mut SourceFd(&ring.kick().as_raw_fd()),
                token::kick(index),
                Interest::READABLE,
            )
            .map_err(|error| format!("cannot watch the kick descriptor: {error}"))?;
        debug!(guest = %self.switchboard.name, queue, size = ring.size(), "ring started");
        // The guest may have made buffers available before anybody listened for its kicks.
        *slot = Some(RunningRing {
            ring,
            broken: false,
            kicked: true,
        });
        Ok(())
    }

    /// Takes a ring out of service; its connections wait.
    fn take_queue(&mut self, now: Instant, index: usize) -> Option<Ring> {
        let running = self.rings.get_mut(index)?.take()?;
        // The VMM keeps its copy of the descriptor open, so closing ours would not end the registration.
        if let Err(error) = self
            .poll
            .registry()
            .deregister(&mut SourceFd(&running.ring.kick().as_raw_fd()))
        {
            warn!(guest = %self.switchboard.name, %error, "cannot stop watching a kick descriptor");
        }
        debug!(guest = %self.switchboard.name, queue = QUEUE_LABELS[index], "ring stopped");
        if index == RX
            && let Some(since) = self.rx_starved_since.take()
        {
            let waited = now.saturating_duration_since(since);
            self.switchboard.metrics.queues[RX]
                .full_seconds
                .inc_by(waited.as_secs_f64());
        }
        Some(running.ring)
    }

    /// A ring was stopped, and not to go on: without both data rings the guest has no connections (invariant 3).
    fn forget_connections(&mut self, now: Instant, index: usize) {
        if self.rings[RX].is_none() && self.rings[TX].is_none() && index != QUEUES - 1 {
            self.unsent = None;
            self.switchboard.reset(now);
        }
    }
}
