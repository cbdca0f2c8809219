//! What goes wrong meanwhile, on purpose.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::{DriverOptions, EmbeddedGuest, Profile, Shape, SocketOptions, Sockets};
use vsock_sidecar::vsock::{Cid, HEADER_LEN, Header, Port};

use crate::Stage;
use crate::support::{Bytes, LONG, until};

pub const ALL: [fn(&Stage); 5] = [reboot_web, kill_db, garbage, scrape, reload];

/// A guest that can be rebooted and killed. What happened between two readings of [`Machine::age`] that differ is excused.
pub struct Machine {
    socket: PathBuf,
    sockets: RwLock<Arc<Sockets>>,
    age: AtomicU64,
}

impl Machine {
    pub fn boot(socket: PathBuf) -> Machine {
        Machine {
            sockets: RwLock::new(Arc::new(sockets(&socket))),
            socket,
            age: AtomicU64::new(0),
        }
    }

    pub fn sockets(&self) -> Arc<Sockets> {
        Arc::clone(&self.sockets.read().unwrap())
    }

    pub fn age(&self) -> u64 {
        self.age.load(Ordering::SeqCst)
    }

    fn disturb(&self, how: impl FnOnce(&Sockets)) {
        let mut place = self.sockets.write().unwrap();
        self.age.fetch_add(1, Ordering::SeqCst);
        how(&place);
        // Connections that were told of the end a moment later are excused as well: they began before it.
        self.age.fetch_add(1, Ordering::SeqCst);
        let _ = &mut place;
    }

    fn replace(&self) {
        let mut place = self.sockets.write().unwrap();
        self.age.fetch_add(1, Ordering::SeqCst);
        place.kill();
        *place = Arc::new(sockets(&self.socket));
        self.age.fetch_add(1, Ordering::SeqCst);
    }
}

/// Boots a guest whose predecessor's end the sidecar may not have noticed yet.
fn boot(socket: &Path) -> EmbeddedGuest {
    let mut booted = None;
    until("the guest boots", || {
        booted = EmbeddedGuest::boot(socket, Profile::qemu(), DriverOptions::default()).ok();
        booted.is_some()
    });
    booted.expect("just looked")
}

fn sockets(socket: &Path) -> Sockets {
    let options = SocketOptions {
        connect_timeout: LONG,
        ..Default::default()
    };
    Sockets::start(boot(socket), options).expect("the guest's sockets start")
}

fn pause(stage: &Stage, time: Duration) {
    let end = std::time::Instant::now() + time;
    while stage.goes_on() && std::time::Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
}

fn reboot_web(stage: &Stage) {
    loop {
        pause(stage, Duration::from_millis(2300));
        if !stage.goes_on() {
            return;
        }
        stage.web.disturb(|sockets| match sockets.reboot() {
            Ok(()) => stage.ledger.count("reboots", 1),
            Err(error) => stage.ledger.fail(format!("web does not reboot: {error}")),
        });
    }
}

fn kill_db(stage: &Stage) {
    loop {
        pause(stage, Duration::from_millis(3700));
        if !stage.goes_on() {
            return;
        }
        stage.db.replace();
        stage.ledger.count("VMMs killed", 1);
    }
}

/// A guest that says anything at all, on rings that are in order so that it can say much.
fn garbage(stage: &Stage) {
    let socket = stage.sidecar.path("rogue.sock");
    let mut bytes = Bytes::new(99);
    while stage.goes_on() {
        let mut rogue = boot(&socket);
        for _ in 0..3000 {
            if !stage.goes_on() {
                break;
            }
            let mut raw = [0; HEADER_LEN];
            bytes.fill(&mut raw);
            let mut header = Header::decode(&raw);
            // Half of it looks like vsock.
            if raw[0] & 1 == 0 {
                header = Header {
                    src_cid: Cid(7),
                    dst_cid: Cid(2),
                    src_port: Port(u32::from(raw[1] % 8)),
                    dst_port: Port(u32::from(raw[2] % 4)),
                    len: u32::from(raw[3]),
                    socket_type: u16::from(raw[4] % 4),
                    op: u16::from(raw[5] % 10),
                    flags: u32::from(raw[6] % 4),
                    buf_alloc: u32::from(raw[7]) << (raw[8] % 24),
                    fwd_cnt: u32::from(raw[9] % 16),
                };
            }
            let payload = vec![raw[10]; usize::from(raw[11])];
            if rogue
                .driver
                .send_packet_wait(
                    &header,
                    &payload,
                    &Shape::header_then_payload(),
                    Duration::from_secs(20),
                )
                .is_err()
            {
                return stage
                    .ledger
                    .fail("the rogue guest's ring is not served any more".to_owned());
            }
            stage.ledger.count("packets of garbage", 1);
            while let Ok(Some(_)) = rogue.driver.try_recv_header() {}
            let _ = rogue.driver.fill_rx();
        }
        // As if its VMM had been killed.
        drop(rogue);
    }
}

/// Somebody who edits: rules, a listener and a guest come and go, bounds change, and now and then the file is broken. The last word
/// is what was there first.
fn reload(stage: &Stage) {
    let file = stage.sidecar.path("sidecar.yaml");
    let first = fs::read_to_string(&file).expect("the configuration");
    let more = first
        .replacen(
            "  - {name: dead,",
            "  - {name: extra, port: 82, to: \"guest://db:80\", connections: 3}\n  - {name: dead,",
            1,
        )
        .replacen(
            "  inbound:\n",
            &format!(
                "  limits: {{connections: 3000, idleTimeout: 1h}}\n  inbound:\n  - {{name: more, listen: \"tcp://127.0.0.1:{}\", port: 22}}\n",
                crate::support::free_port()
            ),
            1,
        )
        + &format!(
            "- name: visitor\n  cid: 9\n  vhostUser: {{socket: \"{}\"}}\n  outbound: [{{port: 1, to: \"guest://web:22\"}}]\n",
            stage.sidecar.path("visitor.sock").display()
        );
    let broken = first.replacen("cid: 3", "cid: three", 1);
    assert!(more.contains("extra") && more.contains("idleTimeout") && broken != first);
    let write = |text: &str, is_good: bool| {
        let counted = |name: &str| stage.sidecar.metric(name, &[]);
        let (family, kind) = match is_good {
            true => ("vsock_config_reloads_total", "reloads"),
            false => ("vsock_config_reload_failures_total", "reloads refused"),
        };
        let before = counted(family);
        let new = file.with_extension("new");
        fs::write(&new, text).expect("a file beside the configuration");
        fs::rename(&new, &file).expect("the configuration is replaced");
        until("the sidecar reads its configuration again", || {
            counted(family) > before
        });
        if (counted("vsock_config_last_reload_successful") == 1.0) != is_good {
            stage.ledger.fail(format!(
                "a reload is taken as one that is {}",
                if is_good { "bad" } else { "good" }
            ));
        }
        stage.ledger.count(kind, 1);
    };
    while stage.goes_on() {
        write(&more, true);
        pause(stage, Duration::from_millis(1700));
        write(&broken, false);
        pause(stage, Duration::from_millis(300));
        write(&first, true);
        pause(stage, Duration::from_millis(1700));
    }
}

/// Prometheus, a person with the status page, and somebody who captures.
fn scrape(stage: &Stage) {
    let mut in_a_row = 0;
    while stage.goes_on() {
        for path in [
            "/metrics",
            "/state",
            "/livez",
            "/capture?guest=web&seconds=1&snaplen=64",
        ] {
            // A capture is no text.
            if path.starts_with("/capture") {
                let _ = stage.sidecar.try_get(path);
                continue;
            }
            match stage.sidecar.try_get(path) {
                Some((200, _)) => {
                    stage.ledger.count("scrapes", 1);
                    in_a_row = 0;
                }
                // A busy machine may keep a thread from answering in time; kubelet asks three times, too.
                Some((503, _)) if path == "/livez" && in_a_row < 2 => {
                    stage.ledger.count("late answers of a device thread", 1);
                    in_a_row += 1;
                }
                other => return stage.ledger.fail(format!("{path}: {other:?}")),
            }
        }
        pause(stage, Duration::from_millis(100));
    }
}
