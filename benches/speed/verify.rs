//! Whether what is measured is right: before anything is timed, some megabytes there and back, compared byte for byte.

use std::io::{Read, Write};
use std::time::Duration;

use crate::support::{Sidecar, echo, linux, serve};

const BYTES: usize = 8 << 20;

/// Panics if a byte is not what it was.
pub fn there_and_back() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "log: {{format: json, level: info}}\nguests:\n- name: g\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/g.sock\"}}\n  \
         outbound:\n  - {{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}\n"
    ));
    let guest = linux(&sidecar.path("g.sock"));
    let stream = &guest.connect(7).expect("the guest connects");
    stream.set_read_timeout(Some(Duration::from_secs(60)));
    // Repeats after a prime, so that no packet or page looks like another.
    let sent: Vec<u8> = (0..BYTES).map(|at| (at % 65_521 % 251) as u8).collect();
    let mut came = vec![0; BYTES];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut out = stream;
            out.write_all(&sent).expect("the guest writes");
        });
        let mut back = stream;
        back.read_exact(&mut came).expect("everything comes back");
    });
    assert!(sent == came, "bytes came back changed");
    assert!(
        guest.stats().violations.is_empty(),
        "{:?}",
        guest.stats().violations
    );
}
