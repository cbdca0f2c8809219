//! Sessions, judged from the VMM's socket and from the device's commands.

mod iotlb;
mod record;
mod support;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use support::*;
use vsock_sidecar::guest::RingPosition;
use vsock_sidecar::vhost_user::message::{Message, VERSION, request};
use vsock_sidecar::vhost_user::{Mode, SessionState};

// ------------------------------------------------------------------------------------------- as QEMU does it

/// QEMU 7.2's messages for a boot, a reboot and its end, in its order: the ring's kick comes before it is enabled, call
/// descriptors come while it is stopped and while it runs.
#[test]
fn qemu_boots_reboots_and_leaves() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    assert_eq!(
        rig.device.take_told(),
        [],
        "nothing runs before the driver is there"
    );
    assert_eq!(rig.negotiation().state, SessionState::Connected);

    let running = vmm.start(&setup);
    use Told::*;
    assert_eq!(
        rig.device.take_told(),
        [SetMemory, Start(0), Start(1), SetCall(0), SetCall(1)]
    );
    for (index, desc) in DESC.iter().enumerate().take(2) {
        rig.device.with_ring(index, |ring| {
            assert_eq!(ring.size, 128);
            assert_eq!(ring.desc, desc - RAM_UADDR);
            assert_eq!(ring.avail, ring.desc + 0x800);
            assert_eq!(ring.used, ring.desc + 0x940);
            assert_eq!(ring.position, RingPosition::default());
            assert!(ring.event_idx);
            // The descriptors are the VMM's: the last call descriptor, not the masked one of before.
            signal(&running.kick[index]);
            assert!(is_signalled(&ring.kick));
            signal(ring.call.as_ref().unwrap());
            assert!(is_signalled(&running.call[index]));
        });
    }
    assert_eq!(rig.negotiation().state, SessionState::Running);

    rig.device.stand_at(
        0,
        RingPosition {
            next_avail: 2,
            next_used: 2,
        },
    );
    rig.device.stand_at(
        1,
        RingPosition {
            next_avail: 65535,
            next_used: 65535,
        },
    );
    assert_eq!(vmm.stop(), [2, 65535], "GET_VRING_BASE is where the device stood");
    vmm.barrier();
    assert_eq!(
        rig.device.take_told(),
        [Stop(0), Stop(1)],
        "a call descriptor of a stopped ring is not for the device"
    );
    assert_eq!(rig.negotiation().state, SessionState::Negotiated);

    // The reboot: QEMU sends the same table again, and rings from zero.
    let _running = vmm.start(&setup);
    assert_eq!(
        rig.device.take_told(),
        [SetMemory, Start(0), Start(1), SetCall(0), SetCall(1)]
    );
    rig.device
        .with_ring(1, |ring| assert_eq!(ring.position, RingPosition::default()));

    drop(vmm);
    let (reason, _) = rig.wait_end(1);
    assert_eq!(reason, "peer_closed", "rings were running");
    assert_eq!(rig.device.take_told(), [EndSession]);
    assert!(!rig.device.has_memory());
}

#[test]
fn a_vmm_that_stops_its_rings_and_closes_is_no_error() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.start(&setup);
    vmm.stop();
    drop(vmm);
    assert_eq!(
        rig.wait_end(1),
        ("vmm_closed", "the VMM closed the connection".into())
    );
    assert_eq!(
        rig.negotiation()
            .session_errors
            .iter()
            .map(|error| error.count)
            .sum::<u64>(),
        0
    );
}

/// The negotiation as it is told to readers while it stands, and what is left of it afterwards.
#[test]
fn the_negotiation_is_told() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start(&setup);
    let now = rig.negotiation();
    assert_eq!((now.session, now.connected, now.assumed), (1, true, false));
    assert!(now.since.is_some());
    assert_eq!(now.peer.as_ref().unwrap().pid, Some(std::process::id()));
    assert_eq!(rig.device.types(), (true, true));
    assert_eq!(
        now.features_offered.names(),
        [
            "stream",
            "seqpacket",
            "no_implied_stream",
            "log_all",
            "ring_indirect_desc",
            "ring_event_idx",
            "protocol_features",
            "version_1",
            "access_platform",
            "in_order"
        ]
    );
    assert_eq!(
        now.features_acked.bits(),
        now.features_offered.bits() & !(1 << 26 | PLATFORM)
    );
    assert_eq!(now.protocol_features_acked, now.protocol_features_offered);
    assert_eq!(
        now.protocol_features_acked.names(),
        [
            "mq",
            "log_shmfd",
            "reply_ack",
            "backend_req",
            "config",
            "reset_device",
            "configure_mem_slots"
        ]
    );
    assert_eq!(now.queue_count, 3);
    assert_eq!(
        (now.memory.len(), now.memory[0].size, now.memory[0].user_address),
        (1, RAM_SIZE, RAM_UADDR)
    );
    let ring = now.rings[0];
    assert_eq!(
        (ring.queue, ring.size, ring.desc, ring.base),
        ("rx", 128, DESC[0], 0)
    );
    assert_eq!(
        (
            ring.enabled,
            ring.started,
            ring.has_kick,
            ring.has_call,
            ring.has_err
        ),
        (true, true, true, true, true)
    );
    assert!(!now.rings[2].enabled);
    assert_eq!(rig.requests("set_vring_call").0, 6);
    assert_eq!(rig.requests("get_config"), (1, 0));
    assert_eq!(rig.requests("iotlb_msg"), (0, 0));
    let json = serde_json::to_value(&now).unwrap();
    assert_eq!(json["rings"][0]["desc"], "0x7fe3e17ec000");
    assert_eq!(json["featuresAcked"]["names"][0], "stream");
    assert_eq!(json["state"], "running");

    drop(vmm);
    rig.wait_end(1);
    let now = rig.negotiation();
    assert_eq!(
        (now.state, now.memory.len(), now.features_acked.bits()),
        (SessionState::Waiting, 0, 0)
    );
    assert!(!now.rings[0].started);
    assert_eq!(rig.requests("get_config"), (1, 0), "counters outlive the session");
    assert_eq!((now.memory_map_changes.set_table, now.sessions_total), (1, 1));
}

/// The `vhost` crate's own front-end, as Cloud Hypervisor uses it: three queues, memory slots.
#[test]
fn the_rust_vmm_front_end_is_served() {
    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
    use vhost::vhost_user::{Frontend, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
    use vmm_sys_util::eventfd::EventFd;

    let rig = Rig::new(Mode::Server);
    let mut vmm = Frontend::connect(rig.socket(), 3).unwrap();
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap() & !(1 << 26 | PLATFORM);
    let protocol = vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    assert_eq!(vmm.get_queue_num().unwrap(), 3);
    assert_eq!(vmm.get_max_mem_slots().unwrap(), 509);
    let (_, config) = vmm
        .get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8])
        .unwrap();
    assert_eq!(config, 3u64.to_le_bytes());
    vmm.set_features(features).unwrap();
    let memory = memory(RAM_SIZE);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: RAM_SIZE,
        userspace_addr: RAM_UADDR,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&memory),
    };
    vmm.add_mem_region(&region).unwrap();
    let events: Vec<EventFd> = (0..6).map(|_| EventFd::new(0).unwrap()).collect();
    for index in 0..3 {
        vmm.set_vring_num(index, 128).unwrap();
        let desc = RAM_UADDR + 0x10000 * (1 + index as u64);
        let ring = VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: desc + 0x1000,
            avail_ring_addr: desc + 0x800,
            log_addr: None,
        };
        vmm.set_vring_addr(index, &ring).unwrap();
        vmm.set_vring_base(index, 0).unwrap();
        vmm.set_vring_call(index, &events[index]).unwrap();
        vmm.set_vring_kick(index, &events[3 + index]).unwrap();
        vmm.set_vring_enable(index, true).unwrap();
    }
    vmm.get_features().unwrap();
    use Told::*;
    assert_eq!(rig.device.take_told(), [SetMemory, Start(0), Start(1), Start(2)]);
    vmm.remove_mem_region(&region).unwrap();
    vmm.get_features().unwrap();
    assert_eq!(rig.device.take_told(), [SetMemory]);
    assert_eq!(rig.negotiation().memory_map_changes.add, 1);
    assert_eq!(rig.negotiation().memory_map_changes.remove, 1);
    assert_eq!(vmm.get_vring_base(2).unwrap(), 0);
    assert_eq!(rig.device.take_told(), [Stop(2)]);
}

// ------------------------------------------------------------------------------------------- done means done

/// Each request whose answer says "done" is answered only after the device thread has.
#[test]
fn no_answer_overtakes_the_device() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start(&setup);
    let more = memory(MIB);
    let slot = [1 << 32, MIB, 0x1000_0000, 0];
    let request_with_reply = |number, body: &[u8]| Message::new(number, VERSION | 8, body);
    let cases: [(Message, &[&std::os::fd::OwnedFd], Told); 4] = [
        (
            request_with_reply(
                request::SET_MEM_TABLE,
                &table_body(&[[0, RAM_SIZE, RAM_UADDR, 0]]),
            ),
            &[&setup.memory],
            Told::SetMemory,
        ),
        (
            request_with_reply(request::ADD_MEM_REG, &region_body(slot)),
            &[&more],
            Told::SetMemory,
        ),
        (
            request_with_reply(request::REM_MEM_REG, &region_body(slot)),
            &[],
            Told::SetMemory,
        ),
        (
            Message::new(request::GET_VRING_BASE, VERSION, &state_body(0, 0)),
            &[],
            Told::Stop(0),
        ),
    ];
    for (message, fds, told) in cases {
        rig.device.take_told();
        rig.device.hold();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        vmm.send_bytes(message.bytes(), &fds);
        rig.device.wait_told(1);
        assert_eq!(rig.device.told(), [told]);
        assert!(
            !vmm.has_reply(),
            "{message:?} was answered before the device had answered"
        );
        rig.device.allow(None);
        assert_eq!(vmm.reply().0, message.request());
    }
}

// ------------------------------------------------------------------------------------------- rings

#[test]
fn a_ring_runs_only_while_it_has_everything_it_needs() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    vmm.set_memory(&setup.memory, RAM_UADDR);
    rig.device.take_told();
    // Enabled and kicked, but nobody has said where it is.
    let kick = event();
    vmm.send_state(request::SET_VRING_ENABLE, 0, 1);
    vmm.send_fd(request::SET_VRING_KICK, 0, &kick);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), []);
    vmm.send(request::SET_VRING_ADDR, &addr_body(0, DESC[0]), &[]);
    vmm.barrier();
    use Told::*;
    assert_eq!(rig.device.take_told(), [Start(0)]);
    rig.device.with_ring(0, |ring| {
        assert_eq!(ring.size, 1024, "the most, since nobody said less")
    });
    // The same address again, as QEMU sends it to log a running ring's writes.
    vmm.send(request::SET_VRING_ADDR, &addr_body(0, DESC[0]), &[]);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), []);
    // Another address, another size, another kick descriptor: the ring begins anew, where it stood.
    rig.device.stand_at(
        0,
        RingPosition {
            next_avail: 7,
            next_used: 7,
        },
    );
    vmm.send_state(request::SET_VRING_NUM, 0, 256);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Stop(0), Start(0)]);
    rig.device.with_ring(0, |ring| {
        assert_eq!((ring.size, ring.position.next_avail), (256, 7))
    });
    let other = event();
    vmm.send_fd(request::SET_VRING_KICK, 0, &other);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Stop(0), Start(0)]);
    signal(&other);
    rig.device.with_ring(0, |ring| assert!(is_signalled(&ring.kick)));
    // Without a kick descriptor (bit 8) we are never told of buffers.
    vmm.send_u64(request::SET_VRING_KICK, 0x100);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Stop(0)]);
    // Without a call descriptor the guest polls: the ring runs.
    vmm.send_fd(request::SET_VRING_KICK, 0, &other);
    vmm.send_u64(request::SET_VRING_CALL, 0x100);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Start(0), SetCall(0)]);
    rig.device.with_ring(0, |ring| assert!(ring.call.is_none()));
}

/// After a crash of the sidecar or its connection, a VMM may believe that buffers were taken which were never returned.
/// The ring is told both, and goes on at the used index (`guest::Ring::new`).
#[test]
fn a_ring_is_told_the_vmms_base_and_the_guests_used_index() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    // The guest's used ring says that five buffers came back; the VMM says that nine were taken.
    let used_idx = DESC[0] - RAM_UADDR + 0x940 + 2;
    rustix::io::pwrite(&setup.memory, &5u16.to_le_bytes(), used_idx).unwrap();
    vmm.set_memory(&setup.memory, RAM_UADDR);
    vmm.set_up_ring(0, 9, DESC[0], &event());
    vmm.send_state(request::SET_VRING_ENABLE, 0, 1);
    vmm.barrier();
    rig.device.with_ring(0, |ring| {
        assert_eq!(
            ring.position,
            RingPosition {
                next_avail: 9,
                next_used: 5
            }
        );
    });
}

#[test]
fn a_ring_that_the_device_refuses_leaves_the_session_alone() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    rig.device.refuse_rings(Some("the used ring is not in memory"));
    let _running = vmm.start(&setup);
    assert_eq!(rig.negotiation().state, SessionState::Negotiated);
    rig.device.refuse_rings(None);
    rig.device.take_told();
    vmm.send_state(request::SET_VRING_ENABLE, 1, 1);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Told::Start(1)], "it may be tried again");
}

#[test]
fn a_size_that_is_no_power_of_two_is_never_started() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    vmm.set_memory(&setup.memory, RAM_UADDR);
    vmm.set_up_ring(0, 0, DESC[0], &event());
    vmm.send_state(request::SET_VRING_NUM, 0, 100);
    vmm.send_state(request::SET_VRING_ENABLE, 0, 1);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Told::SetMemory]);
    vmm.send_state(request::SET_VRING_NUM, 0, 64);
    vmm.barrier();
    assert_eq!(rig.device.take_told(), [Told::Start(0)]);
}

#[test]
fn reset_device_stops_the_rings_and_they_start_only_when_set_up_anew() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let running = vmm.start(&setup);
    rig.device.take_told();
    assert_eq!(vmm.acked(request::RESET_DEVICE, &[], &[]), 0);
    use Told::*;
    assert_eq!(rig.device.take_told(), [Stop(0), Stop(1)]);
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    vmm.send_state(request::SET_VRING_ENABLE, 0, 1);
    vmm.send_fd(request::SET_VRING_KICK, 0, &running.kick[0]);
    vmm.barrier();
    assert_eq!(
        rig.device.take_told(),
        [],
        "its addresses are those of before the reset"
    );
    vmm.set_up_ring(0, 0, DESC[0], &running.kick[0]);
    vmm.barrier();
    assert!(rig.device.told().starts_with(&[Start(0)]));
}

// ------------------------------------------------------------------------------------------- memory

#[test]
fn a_migration_logs_what_is_written() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start(&setup);
    rig.device.take_told();
    let log = memory(MIB);
    let body = [MIB.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    vmm.send(request::SET_LOG_BASE, &body, &[log.as_fd()]);
    assert_eq!(vmm.reply().0, request::SET_LOG_BASE);
    assert!(!rig.negotiation().dirty_log_active);
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    vmm.barrier();
    assert!(rig.negotiation().dirty_log_active);
    assert!(rig.device.logs_writes());
    assert_eq!(rig.device.take_told(), [], "the rings run on");
    // The migration has failed or is done: the crate alone would log for ever.
    vmm.send_u64(request::SET_FEATURES, setup.offered & !(1 << 26 | PLATFORM));
    vmm.barrier();
    assert!(!rig.negotiation().dirty_log_active);
    assert!(!rig.device.logs_writes());
}

/// A balloon, a hot-plugged DIMM, a PCI bar: the table changes while the rings run, and they run on.
#[test]
fn a_table_that_is_replaced_under_running_rings_leaves_them_running() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start(&setup);
    rig.device.take_told();
    let more = memory(MIB);
    let table = table_body(&[[0, RAM_SIZE, RAM_UADDR, 0], [1 << 32, MIB, 0x1000_0000, 0]]);
    assert_eq!(
        vmm.acked(
            request::SET_MEM_TABLE,
            &table,
            &[setup.memory.as_fd(), more.as_fd()]
        ),
        0
    );
    assert_eq!(rig.device.take_told(), [Told::SetMemory]);
    assert_eq!(rig.device.regions(), [(0, RAM_SIZE), (1 << 32, MIB)]);
    for number in [request::REM_MEM_REG, request::ADD_MEM_REG] {
        let fds = [more.as_fd()];
        let fds = if number == request::ADD_MEM_REG {
            &fds[..]
        } else {
            &[]
        };
        assert_eq!(
            vmm.acked(number, &region_body([1 << 32, MIB, 0x1000_0000, 0]), fds),
            0
        );
        assert_eq!(rig.device.take_told(), [Told::SetMemory]);
    }
    assert_eq!(rig.device.regions(), [(0, RAM_SIZE), (1 << 32, MIB)]);
    assert_eq!(rig.negotiation().memory.len(), 2);
    assert_eq!(rig.negotiation().state, SessionState::Running);
}

// ------------------------------------------------------------------------------------------- who may talk

#[test]
fn a_second_vmm_is_refused_while_the_first_works_on() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    for _ in 0..3 {
        let second = rig.connect();
        let _ = (&second.socket).write(Message::new(request::GET_FEATURES, VERSION, &[]).bytes());
        second.wait_closed();
    }
    assert_eq!(rig.negotiation().rejected_connections, 3);
    let _running = vmm.start(&setup);
    assert_eq!(rig.negotiation().sessions_total, 1);
}

#[test]
fn whoever_only_looks_whether_we_listen_is_no_session_and_in_nobodys_way() {
    let rig = Rig::new(Mode::Server);
    for gone in 1..=3 {
        drop(rig.connect());
        wait_until("the connection's end", || {
            rig.negotiation().silent_connections == gone
        });
    }
    // These stay, and say nothing.
    let silent: Vec<Vmm> = (0..20).map(|_| rig.connect()).collect();
    let vmm = rig.connect();
    vmm.realize();
    let now = rig.negotiation();
    assert_eq!((now.sessions_total, now.last_end.is_none()), (1, true));
    assert_eq!(rig.device.told(), []);
    silent.iter().for_each(Vmm::wait_closed);
    wait_until("their refusal", || rig.negotiation().rejected_connections == 20);
}

// ------------------------------------------------------------------------------------------- what goes wrong

/// Every row ends its session, with a reason that names what was wrong, and the next VMM is served.
#[test]
fn a_broken_vmm_costs_its_session_and_nothing_else() {
    let rig = Rig::new(Mode::Server);
    let message = |number, body: &[u8]| Message::new(number, VERSION, body).bytes().to_vec();
    let mut oversize = message(request::SET_MEM_TABLE, &[]);
    oversize[8..].copy_from_slice(&4097u32.to_ne_bytes());
    let rows: [(&str, Vec<u8>, bool, &str, &str); 10] = [
        (
            "garbage",
            b"GET / HTTP/1.1\r\n\r\n".repeat(3),
            false,
            "protocol",
            "announces a body of",
        ),
        (
            "a header cut short",
            message(request::GET_FEATURES, &[])[..5].into(),
            true,
            "protocol",
            "5 of 12 bytes",
        ),
        (
            "a body cut short",
            message(request::SET_FEATURES, &[0; 8])[..15].into(),
            true,
            "protocol",
            "15 of 20 bytes",
        ),
        (
            "a body too long",
            oversize,
            false,
            "protocol",
            "SET_MEM_TABLE announces a body of 4097 bytes",
        ),
        (
            "an unknown request",
            message(4711, &[]),
            false,
            "protocol",
            "request 4711: no such request is known",
        ),
        (
            "a request that is not served",
            message(request::GET_INFLIGHT_FD, &[0; 16]),
            false,
            "protocol",
            "GET_INFLIGHT_FD: it is not served",
        ),
        (
            "a feature that was not offered",
            message(request::SET_FEATURES, &(1u64 << 34).to_ne_bytes()),
            false,
            "feature",
            "SET_FEATURES: features were not offered: ring_packed",
        ),
        (
            "a ring that does not exist",
            message(request::SET_VRING_NUM, &state_body(3, 128)),
            false,
            "vring",
            "SET_VRING_NUM: there is no virtqueue 3",
        ),
        (
            "memory without a file",
            message(request::SET_MEM_TABLE, &table_body(&[[0, MIB, 0, 0]])),
            false,
            "memory",
            "SET_MEM_TABLE: 1 regions and 0 descriptors",
        ),
        (
            "a ring that is nowhere",
            message(request::SET_VRING_ADDR, &addr_body(0, 0x1000)),
            false,
            "vring",
            "SET_VRING_ADDR: the descriptor table at 0x1000 is in no memory region",
        ),
    ];
    for (at, (what, bytes, then_close, reason, detail)) in rows.into_iter().enumerate() {
        let before = rig.errors(reason);
        let vmm = rig.connect();
        vmm.send_bytes(&bytes, &[]);
        if then_close {
            drop(vmm);
        } else {
            vmm.wait_closed();
        }
        let end = rig.wait_end(at as u64 + 1);
        assert_eq!(end.0, reason, "{what}: {}", end.1);
        assert!(end.1.contains(detail), "{what}: {}", end.1);
        assert_eq!(rig.errors(reason), before + 1, "{what}");
    }
    assert_eq!(rig.requests("unknown"), (1, 1));
    assert_eq!(rig.requests("get_inflight_fd"), (1, 1));
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.start(&setup);
}

#[test]
fn memory_that_cannot_be_mapped_is_answered_with_an_error_and_ends_the_session() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    vmm.realize();
    // The file is shorter than the region.
    let short = memory(4096);
    let body = table_body(&[[0, RAM_SIZE, RAM_UADDR, 0]]);
    assert_eq!(vmm.acked(request::SET_MEM_TABLE, &body, &[short.as_fd()]), 1);
    vmm.wait_closed();
    let (reason, detail) = rig.wait_end(1);
    assert_eq!(reason, "memory");
    assert!(
        detail.contains("the region at 0x0 ends at byte 268435456 of its file, which has 4096"),
        "{detail}"
    );
    assert_eq!(rig.requests("set_mem_table"), (1, 1));
    assert_eq!(
        rig.device.told(),
        [Told::EndSession],
        "the device has never seen it"
    );
}

/// vhost-user-backend adds a slot's VMM address and size without a check, which panics where overflow is checked.
#[test]
fn a_panic_in_the_protocol_handler_is_contained() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    let slot = memory(MIB);
    let body = region_body([0, MIB, u64::MAX - 0xfff, 0]);
    assert_eq!(vmm.acked(request::ADD_MEM_REG, &body, &[slot.as_fd()]), 0);
    vmm.send(request::SET_VRING_ADDR, &addr_body(0, u64::MAX - 0xfff), &[]);
    vmm.wait_closed();
    let (reason, detail) = rig.wait_end(1);
    // Without overflow checks it is refused, and blamed on the request.
    assert!(matches!(reason, "panic" | "vring"), "{reason}: {detail}");
    assert!(detail.contains("SET_VRING_ADDR"), "{detail}");
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.start(&setup);
}

#[test]
fn a_device_thread_that_has_ended_ends_the_session() {
    let (device, commands) = FakeDevice::without_thread();
    drop(commands);
    let rig = Rig::with_device(Mode::Server, device);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
    vmm.send(
        request::SET_MEM_TABLE,
        &table_body(&[[0, RAM_SIZE, RAM_UADDR, 0]]),
        &[setup.memory.as_fd()],
    );
    vmm.wait_closed();
    let (reason, detail) = rig.wait_end(1);
    assert_eq!(
        (reason, detail.as_str()),
        (
            "io",
            "the device thread has ended, set the socket types was not done"
        )
    );
}

#[test]
fn shutdown_is_prompt_in_every_state_and_leaves_no_file() {
    for stage in 0..4 {
        let mut rig = Rig::new(Mode::Server);
        let vmm = (stage > 0).then(|| rig.connect());
        let setup = vmm.as_ref().filter(|_| stage > 1).map(Vmm::realize);
        let running = setup
            .as_ref()
            .filter(|_| stage > 2)
            .map(|setup| vmm.as_ref().unwrap().start(setup));
        let began = std::time::Instant::now();
        rig.shutdown();
        assert!(began.elapsed().as_secs() < 2, "stage {stage}");
        assert_eq!(
            std::fs::read_dir(rig.directory.path()).unwrap().count(),
            0,
            "stage {stage}"
        );
        if stage > 1 {
            assert_eq!(rig.negotiation().last_end.unwrap().reason, "shutdown");
            assert_eq!(rig.device.told().last(), Some(&Told::EndSession));
        }
        drop(running);
    }
}

/// A VMM that asks and never reads: the answers fill its socket, and we wait, but not so that we could not end.
#[test]
fn a_vmm_that_does_not_read_its_answers_holds_up_nobody() {
    let mut rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    vmm.socket.set_nonblocking(true).unwrap();
    let questions = Message::new(request::GET_FEATURES, VERSION, &[])
        .bytes()
        .repeat(64);
    // Blocked for good when the socket takes nothing twice, with time for the session in between.
    let mut refused = 0;
    while refused < 20 {
        // What part of them fits does not matter.
        if (&vmm.socket).write(&questions).is_ok_and(|taken| taken > 0) {
            refused = 0;
        } else {
            refused += 1;
            std::thread::park_timeout(std::time::Duration::from_millis(2));
        }
    }
    // It goes on refusing others, and ends when it is told to.
    rig.connect().wait_closed();
    let began = std::time::Instant::now();
    rig.shutdown();
    assert!(began.elapsed().as_secs() < 2);
    assert_eq!(rig.negotiation().last_end.unwrap().reason, "shutdown");
}

/// Whatever somebody says on the socket, with or without descriptors: that session ends or goes on, the next works.
#[test]
fn no_bytes_break_more_than_their_session() {
    use proptest::prelude::*;
    let rig = Rig::new(Mode::Server);
    // Mostly messages, so that they get behind the header's checks.
    let message = (
        0u32..48,
        any::<u32>(),
        proptest::collection::vec(any::<u8>(), 0..64),
    )
        .prop_map(|(number, flags, body)| {
            let flags = if flags % 8 == 0 {
                flags
            } else {
                VERSION | flags & 8
            };
            Message::new(number, flags, &body).bytes().to_vec()
        });
    // Rings that exist, addresses that are mapped, sizes that are right.
    let likely = (8u32..19, 0u32..4, 0u64..3, any::<u64>()).prop_map(|(number, index, value, wild)| {
        let body = match number {
            9 => addr_body(
                index,
                if wild % 4 == 0 {
                    wild
                } else {
                    RAM_UADDR + (value << 20)
                },
            ),
            12..=14 => (u64::from(index) | (value & 1) << 8).to_ne_bytes().to_vec(),
            _ => state_body(index, value as u32),
        };
        Message::new(number, VERSION, &body).bytes().to_vec()
    });
    let saying = proptest::collection::vec((prop_oneof![message, likely], 0usize..3), 1..20);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&saying, |saying| {
        let sessions = rig.negotiation().sessions_total;
        let vmm = rig.connect();
        vmm.socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let setup = vmm.realize();
        vmm.send_u64(request::SET_FEATURES, setup.offered & !PLATFORM);
        vmm.set_memory(&setup.memory, RAM_UADDR);
        let descriptors = [event(), memory(4096)];
        for (bytes, fds) in &saying {
            let fds: Vec<_> = descriptors.iter().take(*fds).map(AsFd::as_fd).collect();
            if !vmm.try_send_bytes(bytes, &fds) {
                break;
            }
        }
        drop(vmm);
        rig.wait_end(sessions + 1);
        prop_assert!(!rig.device.has_memory());
        Ok(())
    });
    result.unwrap();
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.start(&setup);
    assert_eq!(rig.negotiation().state, SessionState::Running);
}

// ------------------------------------------------------------------------------------------- client mode

fn accept(listener: &UnixListener) -> Vmm {
    Vmm::new(listener.accept().unwrap().0)
}

#[test]
fn in_client_mode_we_come_again_until_there_is_a_vmm_and_whenever_it_has_gone() {
    let mut rig = Rig::new(Mode::Client);
    let listener = UnixListener::bind(rig.socket()).unwrap();
    drop(accept(&listener));
    wait_until("the silent connection's end", || {
        rig.negotiation().silent_connections == 1
    });
    for session in 1..=3 {
        let vmm = accept(&listener);
        let setup = vmm.realize();
        assert_eq!(
            setup.protocol & 1 << 15,
            0,
            "no memory slots for a VMM that outlives us"
        );
        vmm.start(&setup);
        assert!(!rig.negotiation().assumed);
        drop(vmm);
        rig.wait_end(session);
    }
    drop(listener);
    rig.shutdown();
    assert!(rig.socket().exists(), "the VMM's socket is not ours to remove");
}

/// What QEMU sends to a back-end that was restarted, when the guest resets: no negotiation, and it waits for answers.
#[test]
fn a_vmm_that_goes_on_with_the_session_of_a_process_before_us_is_served() {
    let rig = Rig::new(Mode::Client);
    let listener = UnixListener::bind(rig.socket()).unwrap();
    let vmm = accept(&listener);
    assert_eq!(vmm.stop(), [0, 0], "rings we have never seen");
    assert!(
        !vmm.has_reply(),
        "the answers to our own messages are not for the VMM"
    );
    let now = rig.negotiation();
    assert!(now.assumed);
    assert_eq!(
        now.protocol_features_acked.bits(),
        now.protocol_features_offered.bits()
    );

    let offered = now.features_offered.bits();
    let setup = Setup {
        offered,
        protocol: now.protocol_features_acked.bits(),
        backend_channel: UnixStream::pair().unwrap().0,
        memory: memory(RAM_SIZE),
    };
    // NEED_REPLY of SET_MEM_TABLE is answered: QEMU holds its global lock meanwhile.
    let _running = vmm.start(&setup);
    use Told::*;
    assert_eq!(
        rig.device.told(),
        [SetMemory, Start(0), Start(1), SetCall(0), SetCall(1)]
    );
    assert_eq!(
        rig.requests("set_owner").0,
        0,
        "our own messages are not the VMM's"
    );
}

/// A listener that accepts nobody: connecting to it would block for ever once its queue is full.
#[test]
fn in_client_mode_a_vmm_that_accepts_nobody_does_not_keep_us_from_ending() {
    let mut rig = Rig::new(Mode::Client);
    let listener = UnixListener::bind(rig.socket()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    // As many as fit, ours perhaps among them.
    loop {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        match socket.connect(&socket2::SockAddr::unix(rig.socket()).unwrap()) {
            Ok(()) => waiting.push(socket),
            Err(_) => break,
        }
    }
    let began = std::time::Instant::now();
    rig.shutdown();
    assert!(began.elapsed().as_secs() < 2);
}
