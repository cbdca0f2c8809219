//! A back-end to prove the guest against, on rust-vmm's crates and nothing of ours: it records what the driver sends,
//! and puts into the receive ring what a [`Host`] answers.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::embedded_guest::profile::feature;
use crate::vsock::header::{HEADER_LEN, Header, Op};

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Between two looks at a condition that has a deadline.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}

/// What the device does with packets.
pub trait Host: Send + Sync {
    /// A packet from the guest; answers go to `out`.
    fn packet(&mut self, header: Header, payload: &[u8], out: &mut Vec<(Header, Vec<u8>)>);
}

/// Answers nothing.
pub struct Silent;

impl Host for Silent {
    fn packet(&mut self, _: Header, _: &[u8], _: &mut Vec<(Header, Vec<u8>)>) {}
}

/// A packet as the driver sent it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// All its bytes.
    pub bytes: Vec<u8>,
    /// The lengths of its descriptors.
    pub descriptors: Vec<u32>,
}

pub struct State {
    memory: Memory,
    vrings: Option<Vec<VringRwLock>>,
    features: u64,
    event_idx: bool,
    host: Box<dyn Host>,
    /// What waits for receive buffers.
    pending: VecDeque<(Header, Vec<u8>)>,
    /// What the driver sent.
    pub seen: Vec<Seen>,
    /// The descriptor lengths of the receive chains that were used.
    pub rx_descriptors: Vec<Vec<u32>>,
    /// Times the driver was interrupted, by queue.
    pub interrupts: [u64; 2],
    /// Times a queue was kicked.
    pub kicks: [u64; 2],
    /// SET_FEATURES messages.
    pub starts: u64,
}

/// The device, listening in a directory of its own.
pub struct TestDevice {
    dir: tempfile::TempDir,
    state: Arc<Mutex<State>>,
}

const CID: u64 = 3;

impl TestDevice {
    /// Serves connections one after the other until the test ends.
    pub fn start(features: u64, host: impl Host + 'static) -> TestDevice {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(Mutex::new(State {
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            vrings: None,
            features: features | feature::VERSION_1 | feature::PROTOCOL_FEATURES,
            event_idx: false,
            host: Box::new(host),
            pending: VecDeque::new(),
            seen: Vec::new(),
            rx_descriptors: Vec::new(),
            interrupts: [0; 2],
            kicks: [0; 2],
            starts: 0,
        }));
        let device = TestDevice { dir, state };
        let mut listener = Listener::new(device.socket(), true).unwrap();
        let state = device.state.clone();
        std::thread::spawn(move || {
            loop {
                state.lock().unwrap().vrings = None;
                let memory = Memory::new(GuestMemoryMmap::new());
                let mut daemon = VhostUserDaemon::new("test-device".into(), state.clone(), memory).unwrap();
                daemon.start(&mut listener).unwrap();
                let _ = daemon.wait();
            }
        });
        device
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost-user.sock")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Sends a packet to the guest, now or as soon as there is a buffer.
    pub fn inject(&self, header: Header, payload: &[u8]) {
        let mut state = self.lock();
        state.pending.push_back((header, payload.to_vec()));
        state.serve_rx();
    }

    /// Waits until a condition holds.
    pub fn wait_until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let state = self.lock();
            if condition(&state) {
                return;
            }
            drop(state);
            assert!(Instant::now() < deadline, "timed out waiting until {what}");
            pause();
        }
    }
}

impl State {
    fn serve_tx(&mut self) {
        let Some(vring) = self.vrings.as_ref().map(|v| v[1].clone()) else {
            return;
        };
        let memory = self.memory.memory();
        loop {
            vring.disable_notification().unwrap();
            let mut served = false;
            loop {
                let chain = vring
                    .get_mut()
                    .get_queue_mut()
                    .pop_descriptor_chain(memory.clone());
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let mut seen = Seen {
                    bytes: Vec::new(),
                    descriptors: Vec::new(),
                };
                for descriptor in chain {
                    let mut bytes = vec![0; descriptor.len() as usize];
                    memory.read_slice(&mut bytes, descriptor.addr()).unwrap();
                    seen.bytes.extend(bytes);
                    seen.descriptors.push(descriptor.len());
                }
                vring.add_used(head, 0).unwrap();
                served = true;
                if let Some(bytes) = seen.bytes.first_chunk::<HEADER_LEN>() {
                    let header = Header::decode(bytes);
                    let mut out = Vec::new();
                    self.host.packet(header, &seen.bytes[HEADER_LEN..], &mut out);
                    self.pending.extend(out);
                }
                self.seen.push(seen);
            }
            if served && vring.needs_notification().unwrap() {
                self.interrupts[1] += 1;
                vring.signal_used_queue().unwrap();
            }
            if !vring.enable_notification().unwrap() {
                break;
            }
        }
        self.serve_rx();
    }

    fn serve_rx(&mut self) {
        let Some(vring) = self.vrings.as_ref().map(|v| v[0].clone()) else {
            return;
        };
        let memory = self.memory.memory();
        let mut used = false;
        while let Some((mut header, payload)) = self.pending.pop_front() {
            let chain = vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else {
                self.pending.push_front((header, payload));
                // All but the last kick are suppressed meanwhile; a buffer that came in between is served now.
                if vring.enable_notification().unwrap() {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let descriptors: Vec<_> = chain.collect();
            let lens: Vec<u32> = descriptors.iter().map(|d| d.len()).collect();
            let room = lens.iter().sum::<u32>() as usize - HEADER_LEN;
            let now = payload.len().min(room);
            header.len = now as u32;
            let flags = header.flags;
            if now < payload.len() {
                // What says that a message ends belongs to its last packet.
                header.flags = 0;
            }
            let mut bytes = header.encode().to_vec();
            header.flags = flags;
            bytes.extend_from_slice(&payload[..now]);
            let mut left = bytes.as_slice();
            for descriptor in descriptors {
                assert!(
                    descriptor.is_write_only(),
                    "a receive buffer the device may not write"
                );
                let (part, rest) = left.split_at(left.len().min(descriptor.len() as usize));
                memory.write_slice(part, descriptor.addr()).unwrap();
                left = rest;
            }
            vring.add_used(head, bytes.len() as u32).unwrap();
            self.rx_descriptors.push(lens);
            used = true;
            if now < payload.len() {
                self.pending.push_front((header, payload[now..].to_vec()));
            }
        }
        if used && vring.needs_notification().unwrap() {
            self.interrupts[0] += 1;
            vring.signal_used_queue().unwrap();
        }
    }
}

impl VhostUserBackendMut for State {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        3
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn acked_features(&mut self, _: u64) {
        self.starts += 1;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        CID.to_le_bytes()[offset as usize..][..size as usize].to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        self.vrings = Some(vrings.to_vec());
        match event {
            0 => {
                self.kicks[0] += 1;
                self.serve_rx();
            }
            1 => {
                self.kicks[1] += 1;
                self.serve_tx();
            }
            _ => {}
        }
        Ok(())
    }
}

/// A header of a stream from the host to the guest.
pub fn from_host(op: Op, src_port: u32, dst_port: u32) -> Header {
    use crate::vsock::header::{Cid, Port};
    Header {
        src_cid: Cid::HOST,
        dst_cid: Cid(CID),
        src_port: Port(src_port),
        dst_port: Port(dst_port),
        len: 0,
        socket_type: 1,
        op: op as u16,
        flags: 0,
        buf_alloc: 256 * 1024,
        fwd_cnt: 0,
    }
}

/// A header from the guest to the host.
pub fn from_guest(op: Op, src_port: u32, dst_port: u32, len: usize) -> Header {
    use crate::vsock::header::Cid;
    Header {
        src_cid: Cid(CID),
        dst_cid: Cid::HOST,
        len: len as u32,
        ..from_host(op, src_port, dst_port)
    }
}
