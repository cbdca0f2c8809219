//! What other threads ask for, carried out between turns.

use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use mio::Interest;
use mio::unix::SourceFd;
use tracing::{debug, warn};

use crate::guest::{Ring, RingError, RingParts, RingPosition};
use crate::metrics::QUEUE_LABELS;
use crate::vsock::SocketTypes;

use super::busy_poll::BusyPoll;
use super::handle::Command;
use super::{Device, Hold, QUEUES, RX, RunningRing, TX, budget, token};

/// What was found in the channel of commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Inbox {
    /// Nothing.
    Empty,
    /// Commands, all of which were taken.
    Emptied,
    /// More than are taken at once.
    Left,
}

impl Device {
    /// Carries commands out until one of them is to stop; whether some are left.
    pub(super) fn handle_commands(&mut self, now: Instant) -> ControlFlow<(), bool> {
        let inbox = self.handle_session_commands(now);
        for _ in 0..budget::COMMANDS {
            match self.waiting.pop_front() {
                Some(Command::Stop) => {
                    self.switchboard.close_all(now);
                    return ControlFlow::Break(());
                }
                Some(command) => self.handle_command(now, command),
                None => break,
            }
        }
        ControlFlow::Continue(inbox == Inbox::Left || !self.waiting.is_empty())
    }

    /// Carries out what the session asks, ahead of all else: a vCPU that takes a buffer back stands still until the
    /// INVALIDATE is answered, however many clients and dials there are. The rest waits, in its order.
    pub(super) fn handle_session_commands(&mut self, now: Instant) -> Inbox {
        let mut inbox = Inbox::Empty;
        for _ in 0..budget::INBOX {
            match self.inbox.try_recv() {
                Ok(command) => {
                    inbox = Inbox::Emptied;
                    if is_of_session(&command) {
                        self.handle_command(now, command);
                    } else {
                        self.waiting.push_back(command);
                    }
                }
                Err(mpsc::TryRecvError::Empty) => return inbox,
                Err(mpsc::TryRecvError::Disconnected) => {
                    self.waiting.push_back(Command::Stop);
                    return Inbox::Emptied;
                }
            }
        }
        Inbox::Left
    }

    /// Answers may find nobody: a session that was shut down no longer waits for them.
    fn handle_command(&mut self, now: Instant, command: Command) {
        match command {
            Command::SetMemory { ram, done } => {
                // Tables share regions: what was lost is lost in the new one too, which has seen no fault and would not know.
                self.let_go_of_lost_memory(now);
                self.ram = ram;
                // Mappings lead to guest-physical addresses, which may mean something else now, or nothing.
                self.flush_translations();
                let _ = done.send(());
            }
            Command::SetTypes {
                stream,
                seqpacket,
                done,
            } => {
                self.switchboard
                    .muxer
                    .set_types(SocketTypes { stream, seqpacket });
                let _ = done.send(());
            }
            Command::StartQueue { index, parts, done } => {
                let _ = done.send(self.start_queue(now, index, parts));
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
            Command::SetListener { listener, done } => {
                self.reports.set_listener(listener);
                self.translation.ask(&self.reports);
                let _ = done.send(());
            }
            Command::UpdateIotlb { mappings, done } => {
                self.translation
                    .update(&mappings, &self.switchboard.metrics.iotlb);
                self.resume(&[Hold::Translation, Hold::Refused]);
                let _ = done.send(());
            }
            Command::InvalidateIotlb { first, last, done } => {
                self.translation
                    .invalidate(first, last, &self.switchboard.metrics.iotlb);
                // What was refused may be mapped now: guests of a vIOMMU in caching mode announce it in this way, and QEMU
                // sends no UPDATE that was not asked for.
                self.resume(&[Hold::Refused]);
                let _ = done.send(());
            }
            Command::FlushIotlb { done } => {
                self.flush_translations();
                let _ = done.send(());
            }
            Command::MissAnswered { miss, refused } => {
                self.translation
                    .answered(miss, refused, &self.switchboard.metrics.iotlb);
                self.resume(&[Hold::Translation]);
            }
            Command::EndSession { done } => {
                self.let_go(now);
                self.reports.forget();
                let _ = done.send(());
            }
            Command::Incoming { rule, incoming } => self.switchboard.handle_incoming(now, rule, incoming),
            Command::Sibling(request) => self.switchboard.handle_sibling(now, *request),
            Command::Dialed { token, result, took } => {
                self.switchboard.handle_dialed(now, token, result, took)
            }
            Command::SiblingAnswered { token, result, took } => {
                self.switchboard.handle_sibling_answered(now, token, result, took);
            }
            Command::Capture { tap, done } => {
                self.captures.add(tap);
                let _ = done.send(());
            }
            Command::Snapshot(reply) => {
                let _ = reply.send(self.snapshot(now));
            }
            Command::Ping(reply) => {
                let _ = reply.send(());
            }
            Command::Reconfigure { settings, done } => {
                // First what a device is made anew from: a panic in what follows must not bring back what was before.
                self.config.limits = settings.limits.clone();
                self.config.rules = Arc::clone(&settings.rules);
                self.busy_poll = BusyPoll::new(settings.limits.busy_poll);
                self.switchboard.reconfigure(settings);
                let _ = done.send(());
            }
            Command::SetCid { cid, done } => {
                self.config.cid = cid;
                self.switchboard.set_cid(cid);
                let _ = done.send(());
            }
            Command::Drain => self.switchboard.drain(now),
            // Taken by handle_commands.
            Command::Stop => {}
        }
    }

    fn start_queue(&mut self, now: Instant, index: usize, parts: RingParts) -> Result<(), String> {
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
        let view = self.translation.view(&ring, ram);
        let unseen = match ring.check(view) {
            // It is asked for now, and the ring gets going when it has come, without a kick. And what is refused today may be
            // mapped tomorrow.
            Err(RingError::Memory { .. }) if ring.is_translated() => true,
            checked => {
                checked.map_err(|error| error.to_string())?;
                false
            }
        };
        // A driver posts its buffers before it says that it is up, so this is a rare wait.
        let blank = index == RX
            && ring.position() == RingPosition::default()
            && (unseen || ring.is_blank(view.without_asking()) == Ok(true));
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
        let translated = ring.is_translated();
        *slot = Some(RunningRing {
            ring,
            held: None,
            told: false,
            told_broken: false,
            told_empty: false,
            kicked: true,
            due: true,
        });
        if blank {
            self.reports.expect_buffers(now);
        }
        if translated {
            self.translation.ask(&self.reports);
        }
        Ok(())
    }

    /// Ends all that there is of a session but its listener.
    pub(super) fn let_go(&mut self, now: Instant) {
        for index in 0..QUEUES {
            self.take_queue(now, index);
            self.forget_connections(now, index);
        }
        self.translation.end_session(&self.switchboard.metrics.iotlb);
        self.switchboard.session_ended(now);
        self.switchboard.muxer.forget_types();
        self.ram = None;
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
        if index == RX {
            self.reports.expect_nothing();
        }
        // QEMU sends no INVALIDATE while the device is stopped (its IOMMU listener goes with `vhost_dev_stop`), so whatever
        // is known may be wrong when it starts again.
        if self.rings.iter().all(Option::is_none) {
            self.flush_translations();
        }
        Some(running.ring)
    }

    /// Forgets all translations; rings that run ask anew.
    fn flush_translations(&mut self) {
        self.translation.flush(&self.switchboard.metrics.iotlb);
        self.resume(&[Hold::Translation, Hold::Refused]);
    }

    /// Lets rings that are held for one of `holds` try again, in the turn that follows.
    fn resume(&mut self, holds: &[Hold]) {
        for running in self.rings.iter_mut().flatten() {
            if running.held.is_some_and(|held| holds.contains(&held)) {
                running.held = None;
                running.due = true;
            }
        }
    }

    /// A ring was stopped, and not to go on: without both data rings the guest has no connections (invariant 3).
    fn forget_connections(&mut self, now: Instant, index: usize) {
        if self.rings[RX].is_none() && self.rings[TX].is_none() && index != QUEUES - 1 {
            self.unsent = None;
            self.switchboard.reset(now);
        }
    }
}

/// Whether it is the session that asks. It waits for most answers before it goes on with what the VMM wants.
fn is_of_session(command: &Command) -> bool {
    match command {
        Command::SetMemory { .. }
        | Command::SetTypes { .. }
        | Command::StartQueue { .. }
        | Command::StopQueue { .. }
        | Command::SetCall { .. }
        | Command::SetListener { .. }
        | Command::UpdateIotlb { .. }
        | Command::InvalidateIotlb { .. }
        | Command::FlushIotlb { .. }
        | Command::MissAnswered { .. }
        | Command::SetCid { .. }
        | Command::EndSession { .. } => true,
        Command::Incoming { .. }
        | Command::Sibling(_)
        | Command::Dialed { .. }
        | Command::SiblingAnswered { .. }
        | Command::Capture { .. }
        | Command::Snapshot(_)
        | Command::Ping(_)
        | Command::Reconfigure { .. }
        | Command::Drain
        | Command::Stop => false,
    }
}
