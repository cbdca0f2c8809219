//! Sessions in which ACCESS_PLATFORM is acknowledged.

use std::os::unix::net::UnixStream;

use vsock_sidecar::device::DeviceEvent;
use vsock_sidecar::guest::{Access, Mapping, Miss, Permission, RingPosition};
use vsock_sidecar::vhost_user::AccessPlatform;
use vsock_sidecar::vhost_user::message::{Message, NEED_REPLY, REPLY, VERSION, request};

use super::support::*;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
/// Where Linux puts the rings behind Intel's IOMMU.
const IOVAS: [u64; 2] = [0xffff_f000, 0xffff_e000];
/// Guest-physical addresses of the pages behind them.
const PAGES: [u64; 2] = [0x180_0000, 0x17f_f000];

fn iotlb_body(iova: u64, size: u64, uaddr: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut body = [iova, size, uaddr].map(u64::to_ne_bytes).concat();
    body.extend_from_slice(&[perm, kind, 0, 0, 0, 0, 0, 0]);
    body
}

fn page(iova: u64, gpa: u64) -> Mapping {
    Mapping {
        iova,
        len: 0x1000,
        gpa,
        permission: Permission::ReadWrite,
    }
}

impl Vmm {
    fn update(&self, iova: u64, gpa: u64) -> u64 {
        let body = iotlb_body(iova, 0x1000, RAM_UADDR + gpa, 3, UPDATE);
        self.acked(request::IOTLB_MSG, &body, &[])
    }

    fn invalidate(&self, iova: u64, size: u64) -> u64 {
        self.acked(request::IOTLB_MSG, &iotlb_body(iova, size, 0, 0, INVALIDATE), &[])
    }

    /// Everything from DRIVER_OK until both rings are enabled.
    fn start_behind_iommu(&self, setup: &Setup, addresses: [u64; 2]) -> Running {
        let running = Running {
            kick: [event(), event()],
            call: [event(), event()],
        };
        self.send_u64(request::SET_FEATURES, setup.offered & !(1 << 26));
        assert_eq!(self.set_memory(&setup.memory, RAM_UADDR), 0);
        for index in 0..2 {
            self.set_up_ring(index, 0, addresses[index as usize], &running.kick[index as usize]);
        }
        for index in 0..2 {
            self.send_state(request::SET_VRING_ENABLE, index, 1);
        }
        running
    }
}

/// What the device asks for next, on our end of the channel.
fn asked(channel: &UnixStream) -> (u64, u8, bool) {
    use std::io::Read;
    channel.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; 12 + 32];
    (&mut &*channel).read_exact(&mut bytes).expect("a miss");
    let field = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((field(0), field(8)), (1, 32), "VHOST_USER_BACKEND_IOTLB_MSG");
    assert_eq!(field(4) & !NEED_REPLY, VERSION);
    assert_eq!(bytes[12 + 25], MISS);
    let iova = u64::from_ne_bytes(bytes[12..20].try_into().unwrap());
    (iova, bytes[12 + 24], field(4) & NEED_REPLY != 0)
}

fn answer(channel: &UnixStream, value: u64) {
    use std::io::Write;
    let message = Message::new(1, VERSION | REPLY, &value.to_ne_bytes());
    (&mut &*channel).write_all(message.bytes()).unwrap();
}

/// The order of QEMU 7.2 with intel-iommu: rings are enabled before anything is mapped, then the pages of the used rings
/// are, and a miss is answered on the channel only after its UPDATE was acknowledged on the main socket.
#[test]
fn qemu_behind_an_iommu_boots_translates_and_resets() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    assert_ne!(setup.offered & PLATFORM, 0);
    let _running = vmm.start_behind_iommu(&setup, IOVAS);
    for index in 0..2 {
        assert_eq!(vmm.update(IOVAS[index], PAGES[index]), 0);
    }
    use Told::*;
    assert_eq!(
        rig.device.take_told(),
        [
            Flush,
            SetMemory,
            Start(0),
            Start(1),
            Update(vec![page(IOVAS[0], PAGES[0])]),
            Update(vec![page(IOVAS[1], PAGES[1])])
        ]
    );
    for (index, iova) in IOVAS.into_iter().enumerate() {
        rig.device.with_ring(index, |ring| {
            assert!(ring.translated);
            assert_eq!(
                [ring.desc, ring.avail, ring.used],
                [iova, iova + 0x800, iova + 0x940],
                "the placeholder is the crate's alone"
            );
        });
    }

    let miss = Miss {
        iova: 0xfff7_4000,
        access: Access::Read,
    };
    rig.device.tell(DeviceEvent::Miss(miss));
    assert_eq!(asked(&setup.backend_channel), (0xfff7_4000, 1, true));
    assert_eq!(vmm.update(0xfff7_4000, 0x5000), 0);
    answer(&setup.backend_channel, 0);
    assert_eq!(vmm.invalidate(0xfff7_4000, 0x1000), 0);
    rig.device.wait_told(3);
    let mut told = rig.device.take_told();
    // The channel's answer and the main socket's next message come by two ways.
    told.sort_by_key(|told| matches!(told, Answered(..)));
    assert_eq!(
        told,
        [
            Update(vec![page(0xfff7_4000, 0x5000)]),
            Invalidate(0xfff7_4000, 0xfff7_4fff),
            Answered(miss, false)
        ]
    );

    // A refusal: no UPDATE, an error on the channel.
    rig.device.tell(DeviceEvent::Miss(Miss {
        iova: 0x1000,
        access: Access::Write,
    }));
    assert_eq!(asked(&setup.backend_channel), (0x1000, 2, true));
    answer(&setup.backend_channel, 1);
    rig.device.wait_told(1);
    assert_eq!(
        rig.device.take_told(),
        [Answered(
            Miss {
                iova: 0x1000,
                access: Access::Write
            },
            true
        )]
    );

    // system_reset: the IOMMU is reset under the running rings, then these stop. GET_VRING_BASE needs no memory.
    assert_eq!(vmm.invalidate(0, 0x80_0000_0000), 0);
    let at = |next| RingPosition {
        next_avail: next,
        next_used: next,
    };
    rig.device.stand_at(0, at(7));
    rig.device.stand_at(1, at(9));
    assert_eq!(vmm.stop(), [7, 9]);
}

/// QEMU waits for the acknowledgement with its global lock held, and frees the page once it has it.
#[test]
fn an_invalidation_is_acknowledged_after_the_device_and_the_vmm_may_be_slow_about_everything_else() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start_behind_iommu(&setup, IOVAS);
    assert_eq!(vmm.update(IOVAS[0], PAGES[0]), 0);
    rig.device.take_told();
    rig.device.hold();
    let body = iotlb_body(IOVAS[0], 0x1000, 0, 0, INVALIDATE);
    let message = Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &body);
    vmm.send_bytes(message.bytes(), &[]);
    // Requests behind it wait as well, and their answers keep their order.
    vmm.send(request::GET_FEATURES, &[], &[]);
    rig.device.wait_told(1);
    assert!(!vmm.has_reply());
    // Misses go out all the same: nothing waits for them, and they wait for nothing.
    rig.device.allow(None);
    rig.device.wait_told(1);
    assert_eq!(vmm.reply_u64(request::IOTLB_MSG), 0);
    assert_eq!(vmm.reply_u64(request::GET_FEATURES), setup.offered);
}

/// The front-end's single thread does something else before it answers a miss: whoever waited for the answer here would
/// never serve that.
#[test]
fn a_miss_that_is_never_answered_keeps_nobody_from_anything() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start_behind_iommu(&setup, IOVAS);
    for number in 0..40 {
        rig.device.tell(DeviceEvent::Miss(Miss {
            iova: number * 0x1000,
            access: Access::Read,
        }));
    }
    assert_eq!(vmm.update(IOVAS[0], PAGES[0]), 0);
    assert_eq!(vmm.invalidate(IOVAS[0], 0x1000), 0);
    assert_eq!(vmm.stop(), [0, 0]);
    drop(vmm);
    assert_eq!(rig.wait_end(1).0, "vmm_closed");
    let again = rig.connect();
    let setup = again.realize();
    let _running = again.start_behind_iommu(&setup, IOVAS);
    assert_eq!(again.update(IOVAS[0], PAGES[0]), 0);
}

/// crosvm and libkrun acknowledge whatever is offered, and mean nothing by it.
#[test]
fn a_silent_front_end_with_its_own_addresses_is_served_as_if_the_feature_were_not_there() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start_behind_iommu(&setup, DESC);
    vmm.barrier();
    for (index, desc) in DESC.into_iter().enumerate() {
        rig.device.with_ring(index, |ring| {
            assert!(!ring.translated);
            assert_eq!(ring.desc, desc - RAM_UADDR);
        });
    }
    // It was an IOMMU after all: the rings are started anew with the same addresses as IOVAs, and it stays so.
    rig.device.take_told();
    assert_eq!(vmm.update(DESC[0], PAGES[0]), 0);
    use Told::*;
    assert_eq!(
        rig.device.take_told(),
        [
            Stop(0),
            Start(0),
            Stop(1),
            Start(1),
            Update(vec![page(DESC[0], PAGES[0])])
        ]
    );
    for (index, desc) in DESC.into_iter().enumerate() {
        rig.device.with_ring(index, |ring| {
            assert!(ring.translated);
            assert_eq!(ring.desc, desc);
        });
    }
}

/// The addresses of a ring outlive its stop, so the proof that they are IOVAs may come between stop and start.
#[test]
fn a_ring_that_is_stopped_when_the_iommu_shows_itself_is_translated_when_it_starts_again() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let running = vmm.start_behind_iommu(&setup, DESC);
    vmm.send_state(request::GET_VRING_BASE, 0, 0);
    vmm.reply();
    assert_eq!(vmm.update(DESC[0], PAGES[0]), 0);
    vmm.send_fd(request::SET_VRING_KICK, 0, &running.kick[0]);
    vmm.barrier();
    rig.device
        .with_ring(0, |ring| assert!(ring.translated, "served without the IOMMU"));
}

#[test]
fn a_feature_that_was_not_offered_costs_the_session_or_the_request() {
    let rig = Rig::with_policy(AccessPlatform::Off);
    let vmm = rig.connect();
    let setup = vmm.realize();
    assert_eq!(setup.offered & PLATFORM, 0);
    let bits = (setup.offered | PLATFORM) & !(1 << 26);
    assert_eq!(vmm.acked(request::SET_FEATURES, &bits.to_ne_bytes(), &[]), 1);
    assert_eq!(rig.requests("set_features"), (1, 1));
    // The session goes on, with the features that it may have.
    assert_eq!(
        vmm.acked(request::SET_FEATURES, &(bits & !PLATFORM).to_ne_bytes(), &[]),
        0
    );
    vmm.send_u64(request::SET_FEATURES, bits);
    vmm.wait_closed();
    let (reason, detail) = rig.wait_end(1);
    assert_eq!(reason, "feature");
    assert_eq!(
        detail,
        "SET_FEATURES: features were not offered: access_platform (vhostUser.accessPlatform is off)"
    );
    assert_eq!(rig.requests("set_features"), (3, 2));
    rig.connect().realize();
}

#[test]
fn bad_requests_are_refused_one_by_one_and_the_session_lives() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start_behind_iommu(&setup, IOVAS);
    let rows = [
        (77, vec![]),
        (request::SET_VRING_NUM, state_body(9, 128)),
        (request::SET_VRING_NUM, state_body(0, 1025)),
        (request::SET_VRING_ENABLE, state_body(0, 2)),
        (request::SET_VRING_NUM, vec![0; 3]),
        (request::SET_OWNER, vec![]),
        (request::IOTLB_MSG, iotlb_body(0x5000, 0, RAM_UADDR, 3, UPDATE)),
        (request::IOTLB_MSG, iotlb_body(0x5000, 0x1000, 0x1000, 3, UPDATE)),
        (
            request::IOTLB_MSG,
            iotlb_body(u64::MAX, 0x1000, RAM_UADDR, 3, UPDATE),
        ),
        (request::IOTLB_MSG, iotlb_body(u64::MAX, 0x1000, 0, 0, INVALIDATE)),
        (request::IOTLB_MSG, iotlb_body(0x5000, 0x1000, RAM_UADDR, 3, MISS)),
        (request::IOTLB_MSG, vec![0; 31]),
    ];
    for (number, body) in rows {
        assert_eq!(
            vmm.acked(number, &body, &[]),
            1,
            "request {number} with {body:02x?}"
        );
    }
    assert_eq!(vmm.update(IOVAS[0], PAGES[0]), 0);
    assert_eq!(rig.negotiation().session, 1);
}

/// What is answered here is answered in its place, however the VMM asks.
#[test]
fn answers_keep_the_order_of_the_requests_of_a_vmm_that_does_not_wait_for_them() {
    let rig = Rig::new(vsock_sidecar::vhost_user::Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start_behind_iommu(&setup, IOVAS);
    let insistent = |number, body: &[u8]| Message::new(number, VERSION | NEED_REPLY, body).bytes().to_vec();
    let update = iotlb_body(0x5000, 0x1000, RAM_UADDR, 3, UPDATE);
    let mut bytes = Vec::new();
    let mut expected = Vec::new();
    for round in 0..200 {
        for (number, body, value) in [
            (request::GET_FEATURES, vec![], setup.offered),
            (request::IOTLB_MSG, update.clone(), 0),
            (request::SET_VRING_ENABLE, state_body(round % 2, 1), 0),
            (77, vec![], 1),
            (request::GET_PROTOCOL_FEATURES, vec![], setup.protocol),
            (request::IOTLB_MSG, vec![], 1),
        ] {
            bytes.extend(insistent(number, &body));
            expected.push((number, value));
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::Write;
            (&vmm.socket).write_all(&bytes).unwrap();
        });
        for (at, (number, value)) in expected.into_iter().enumerate() {
            let (answered, body) = vmm.reply();
            assert_eq!(
                (answered, u64::from_ne_bytes(body.try_into().unwrap())),
                (number, value),
                "answer {at}"
            );
        }
    });
}
