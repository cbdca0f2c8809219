//! Clients of the hook that are no virt-launcher.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vsock_sidecar::kubevirt::hook::MAX_CONNECTIONS;
use vsock_sidecar::kubevirt::hook::messages::{
    Empty, InfoResult, OnDefineDomainParams, OnDefineDomainResult,
};

use super::support::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A SETTINGS frame without settings (RFC 9113, 6.5).
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Writes as much as is taken and reads until the hook has had enough.
fn say(pod: &Pod, bytes: &[u8]) {
    let mut stream = UnixStream::connect(pod.hook()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    // It may close while we write.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn garbage_ends_its_own_connection() {
    let (mut pod, launcher) = (Pod::start(), Launcher::new());
    let long_header = [&[0x00, 0x40, 0x00, 1, 4, 0, 0, 0, 1][..], &[0x82; 0x4000]].concat();
    for garbage in [
        &b""[..],
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x00\x01\x02\x03",
        &[0xff; 100_000],
        PREFACE,
        &[PREFACE, SETTINGS, &[0xff; 64]].concat(),
        // A frame that claims 16 MiB.
        &[PREFACE, SETTINGS, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
        // HEADERS of one field sixteen thousand times over.
        &[PREFACE, SETTINGS, &long_header].concat(),
        // DATA of a stream that nobody has opened.
        &[PREFACE, SETTINGS, &[0, 0, 1, 0, 0, 0, 0, 0, 7, 0]].concat(),
    ] {
        say(&pod, garbage);
        pod.assert_running();
    }
    let info: InfoResult = launcher.call(&pod.hook(), INFO, Empty {}).unwrap();
    assert_eq!(info.name, "vsock-sidecar");
}

#[test]
fn silent_connections_keep_nobody_out() {
    let (pod, launcher) = (Pod::start(), Launcher::new());
    let mut silent: Vec<UnixStream> = (0..MAX_CONNECTIONS * 3)
        .map(|_| {
            let mut stream = UnixStream::connect(pod.hook()).unwrap();
            let _ = stream.write_all(PREFACE);
            stream
        })
        .collect();
    let asked = OnDefineDomainParams {
        domain_xml: b"<domain/>".into(),
        vmi: Vec::new(),
    };
    let _: OnDefineDomainResult = launcher.call(&pod.hook(), DEFINE, asked).unwrap();
    // The oldest had to go.
    let first = &mut silent[0];
    first.set_read_timeout(Some(LONG)).unwrap();
    let mut rest = Vec::new();
    let _ = first.read_to_end(&mut rest);
}

#[test]
fn a_message_that_is_no_message_is_an_error_of_the_call() {
    let (pod, launcher) = (Pod::start(), Launcher::new());
    // Field 1 of Info's answer is a string; that of this message, taken for OnDefineDomainParams, is bytes that are no XML.
    let odd = InfoResult {
        name: "x".into(),
        hook_points: Vec::new(),
        versions: vec!["y".into()],
    };
    let answer: Result<OnDefineDomainResult, _> = launcher.call(&pod.hook(), DEFINE, odd);
    assert_eq!(answer.unwrap_err().code(), tonic::Code::InvalidArgument);
}
