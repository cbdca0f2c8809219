//! Packets in the RX ring: payload lands in the writable parts of the chains, in order, headers before it, and nowhere else.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vsock_sidecar::guest::{Access, RxBurst};
use vsock_sidecar::sys::iovec::IoVecs;
use vsock_sidecar::sys::vectored::readv;

use super::memory::{Ram, Run, part};
use super::model::{Areas, Chain, HEADER, Model};
use super::{MAX_STEPS, Rig, believe, view};
use crate::input::Input;

/// Descriptors after which no further chain is held.
const MAX_DESCRIPTORS: usize = 2048;
/// Bytes that are read at once, at most: what a socket holds.
const MOST: usize = 65_536;

thread_local! {
    static SOCKETS: (UnixStream, UnixStream) = UnixStream::pair().expect("sockets");
}

/// Runs a case; panics where the RX ring breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let Some(mut rig) = Rig::new(&mut input, Access::Write) else {
        return;
    };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        if input.below(3) == 0 {
            burst(&mut rig, &mut input);
        } else {
            rig.between(&mut input);
        }
    }
}

/// The chains that are held.
#[derive(Default)]
struct Held {
    chains: Vec<(u16, Vec<Run>)>,
    room: usize,
    filled: usize,
}

impl Held {
    /// The payload areas, one behind the other.
    fn payload(&self) -> Vec<Run> {
        let areas = self.chains.iter().map(|(_, runs)| part(runs, HEADER, usize::MAX));
        areas.collect::<Vec<_>>().concat()
    }
}

/// The model does not know what becomes of every chain that waits.
struct Unsure;

/// A chain that is taken: its head, its bytes, and of how many descriptors it consists.
type Taken = (u16, Vec<Run>, usize);

struct Judge<'a> {
    ram: &'a mut Ram,
    model: &'a mut Model,
    areas: &'a Areas,
    held: Held,
    faults: u32,
}

impl Judge<'_> {
    fn give_back(&mut self) {
        self.model.next_avail = self.model.next_used;
        self.held = Held::default();
    }

    /// Looks at the next chain and takes it, or rejects it: `Some(None)`. A chain that cannot be used stays where it is if
    /// something is held before it: `None`.
    fn next(&mut self, payload: bool) -> Result<Option<Option<Taken>>, Unsure> {
        let Some(head) = self.model.next_head(self.ram, self.areas) else {
            return Ok(None);
        };
        match self.model.chain(self.ram, self.areas, head, Access::Write) {
            Chain::Unclear => return Err(Unsure),
            Chain::Lacks => {
                self.model.park();
                return Ok(None);
            }
            Chain::Good(runs, descriptors) if !payload || length(&runs) > HEADER => {
                self.model.next_avail = self.model.next_avail.wrapping_add(1);
                return Ok(Some(Some((head, runs, descriptors))));
            }
            Chain::Good(..) | Chain::Bad(_) if !self.held.chains.is_empty() => return Ok(None),
            Chain::Good(..) | Chain::Bad(_) => {}
        }
        self.model.next_avail = self.model.next_avail.wrapping_add(1);
        self.model.use_chain(self.ram, self.areas, head, 0);
        self.faults += 1;
        Ok(Some(None))
    }

    fn reserve(&mut self, limit: usize, max_chains: usize) -> Result<(), Unsure> {
        self.give_back();
        let mut descriptors = 0;
        while self.held.room < limit && self.held.chains.len() < max_chains && descriptors < MAX_DESCRIPTORS {
            match self.next(true)? {
                None => break,
                Some(None) => {}
                Some(Some((head, runs, more))) => {
                    descriptors += more;
                    self.held.room += length(&runs) - HEADER;
                    self.held.chains.push((head, runs));
                }
            }
        }
        Ok(())
    }

    fn control(&mut self, header: &[u8; HEADER]) -> Result<bool, Unsure> {
        self.give_back();
        loop {
            match self.next(false)? {
                None => return Ok(false),
                Some(None) => {}
                Some(Some((head, runs, _))) => {
                    self.ram.write(&runs, 0, header);
                    self.model.use_chain(self.ram, self.areas, head, HEADER as u32);
                    return Ok(true);
                }
            }
        }
    }

    fn place(&mut self, bytes: &[u8]) {
        self.ram.write(&self.held.payload(), self.held.filled, bytes);
    }

    fn commit(&mut self, read: usize) -> usize {
        let mut left = self.held.filled + read;
        let mut packets = 0;
        for (head, runs) in std::mem::take(&mut self.held.chains) {
            if left == 0 {
                break;
            }
            let len = left.min(length(&runs) - HEADER);
            self.ram.write(&runs, 0, &header(len as u32));
            self.model
                .use_chain(self.ram, self.areas, head, (HEADER + len) as u32);
            left -= len;
            packets += 1;
        }
        self.give_back();
        packets
    }
}

fn length(runs: &[Run]) -> usize {
    runs.iter().map(|(_, n)| n).sum()
}

/// A header by which a packet of this length is known.
fn header(len: u32) -> [u8; HEADER] {
    let mut bytes = [0xa5; HEADER];
    bytes[24..28].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Payload that shows where it came from.
fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ n >> 8) as u8 | 1).collect()
}

fn burst(rig: &mut Rig, input: &mut Input<'_>) {
    let Rig {
        ram,
        guest,
        iotlb,
        ring,
        model,
        driver,
        ..
    } = rig;
    let view = view(guest, iotlb.as_ref());
    let areas = model.areas(ram);
    let burst = RxBurst::begin(ring, view);
    let Ok(areas) = areas else {
        assert!(burst.is_err(), "the ring is not in memory");
        return;
    };
    let begins = model.begin(ram, &areas);
    let Ok(mut burst) = burst.map_err(|error| assert!(!begins, "{error}")) else {
        return ram.assert_same();
    };
    assert!(begins, "an available index that cannot be");
    let mut judge = Judge {
        ram,
        model,
        areas: &areas,
        held: Held::default(),
        faults: 0,
    };
    let mut unsure = false;
    let finishes = loop {
        if input.is_empty() {
            break true;
        }
        match input.below(12) {
            0..=3 => {
                let (limit, chains) = (input.size() as usize, 1 + usize::from(input.u8()));
                let room = burst.reserve(limit, chains);
                match judge.reserve(limit, chains) {
                    Err(Unsure) => unsure = true,
                    Ok(()) if unsure => {}
                    Ok(()) => match room {
                        Ok(room) => {
                            assert!(!judge.model.broken);
                            assert_eq!(room, judge.held.room);
                        }
                        Err(error) => assert!(judge.model.broken, "{error}"),
                    },
                }
                if judge.model.broken && !unsure {
                    break true;
                }
            }
            4 => {
                let bytes = input.bytes(255);
                let filled = burst.fill(bytes);
                if !unsure {
                    let n = bytes.len().min(judge.held.room - judge.held.filled);
                    assert_eq!(filled, n);
                    judge.place(&bytes[..n]);
                    judge.held.filled += n;
                }
            }
            5..=7 => {
                let limit = (input.size() as usize).min(MOST);
                let mut list = IoVecs::new();
                let room = burst.push_payload(&mut list, limit);
                assert!(room <= limit);
                let read = match input.below(3) {
                    0 => (input.size() as usize).min(room),
                    _ => room,
                };
                let bytes = payload(read);
                if read > 0 {
                    SOCKETS.with(|(theirs, ours)| {
                        (&*theirs).write_all(&bytes).expect("the socket has room");
                        let received = readv(ours.as_fd(), &list).expect("there are bytes");
                        // What was not asked for would be there the next time.
                        assert_eq!(received.bytes, read);
                    });
                }
                if !unsure {
                    let free = judge.held.room - judge.held.filled;
                    assert!(room == limit.min(free) || list.is_full());
                    judge.place(&bytes);
                }
                let packets = burst.commit(read, header);
                if !unsure {
                    assert_eq!(packets.ok(), Some(judge.commit(read)));
                }
            }
            8 => {
                let bytes = header(0);
                let sent = burst.control(&bytes);
                match judge.control(&bytes) {
                    Err(Unsure) => unsure = true,
                    Ok(_) if unsure => {}
                    Ok(expected) => match sent {
                        Ok(sent) => assert_eq!(sent, expected),
                        Err(error) => assert!(judge.model.broken, "{error}"),
                    },
                }
                if judge.model.broken && !unsure {
                    break true;
                }
            }
            9 => {
                driver.act(judge.ram, input);
            }
            10 => {
                let has = burst.has_buffer();
                judge.give_back();
                let head = judge.model.next_head(judge.ram, &areas);
                let chain = head.map(|head| judge.model.chain(judge.ram, &areas, head, Access::Write));
                unsure |= chain == Some(Chain::Unclear);
                if chain == Some(Chain::Lacks) {
                    judge.model.park();
                }
                if !unsure {
                    let expected = chain.is_some_and(|chain| chain != Chain::Lacks);
                    assert_eq!(has.ok(), (!judge.model.broken).then_some(expected));
                }
                // It only looked.
                judge.model.broken = false;
            }
            _ => match input.below(4) {
                0 => {
                    burst.give_back();
                    judge.give_back();
                }
                1 => break false,
                _ => break true,
            },
        }
        // What is held may be written, all of it.
        let mut list = IoVecs::new();
        let room = burst.push_payload(&mut list, usize::MAX);
        if !unsure && !list.is_full() {
            assert_eq!(room, judge.held.room - judge.held.filled);
        }
    };
    let faults = judge.faults;
    let finished = finishes.then(|| burst.finish());
    if unsure {
        believe(ram, model, ring);
    } else {
        let used = model.publish(ram, &areas);
        match finished {
            Some(Ok(finished)) => {
                assert!(!model.broken);
                assert_eq!((finished.used, finished.parked), (used, model.is_parked()));
            }
            Some(Err(error)) => assert!(model.broken, "{error}"),
            None => {}
        }
        assert_eq!(ring.position(), model.position());
        assert_eq!(ring.take_faults().total(), faults);
    }
    ring.take_faults();
    ram.assert_same();
    rig.take_misses();
}
