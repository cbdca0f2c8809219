//! Turns the log of a vhost-user conversation into a case of the corpus.
//!
//! `cargo run --example trace_to_corpus -- DIRECTORY LOG...` writes `DIRECTORY/NAME.case` for each log. Of a log's lines those
//! count that have `qemu->us NAME FIELD...` in them; a run of more than [`MOST_ALIKE`] INVALIDATEs is cut short, since a
//! guest that posts its buffers sends hundreds. The VMM's memory is taken to the address that the encoding has for it,
//! and feature bits to those that are offered.

use std::fs;
use std::path::Path;

use vsock_sidecar::vhost_user::message::{NEED_REPLY, REQUEST_NAMES, VERSION, request};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

#[path = "../../tests/fuzz/steps.rs"]
#[allow(dead_code)] // what decodes
mod steps;

use steps::{Case, Op, RAM_SIZE, RAM_UADDR, Writer};

/// INVALIDATEs in a row that are kept.
const MOST_ALIKE: usize = 4;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().expect("usage: trace_to_corpus DIRECTORY LOG...");
    for log in arguments {
        let text = fs::read_to_string(&log).expect("a log that can be read");
        let name = Path::new(&log).file_stem().and_then(|name| name.to_str());
        let file = format!("{directory}/{}.case", name.expect("a log has a name"));
        let bytes = convert(&text, Case::head(AccessPlatform::Auto, Mode::Server));
        fs::write(&file, bytes).expect("a corpus that can be written");
    }
}

fn convert(text: &str, head: u8) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.u8(head);
    let mut uaddr = RAM_UADDR;
    let mut alike = 0;
    for line in text.lines() {
        if let Some(ring) = line.trim_start().split_once("kick ").map(|(_, ring)| ring)
            && !line.contains("->")
        {
            writer.op(Op::Kick).u8(ring.trim().parse().unwrap_or(0));
        }
        if line.contains("[reply on backend channel]") {
            writer.op(Op::Misses).u8(0).u16(0x100);
        }
        let Some((_, said)) = line.split_once("qemu->us ") else {
            continue;
        };
        alike = if said.contains("INVALIDATE") { alike + 1 } else { 0 };
        if alike <= MOST_ALIKE {
            if let Some(base) = field(said, "uaddr").filter(|_| said.contains("gpa=")) {
                uaddr = base;
            }
            write(&mut writer, said, |address| moved(address, uaddr));
        }
    }
    writer.finish()
}

/// An address of the VMM's memory where the encoding has it.
fn moved(address: u64, base: u64) -> u64 {
    match address.checked_sub(base) {
        Some(offset) if offset < RAM_SIZE => RAM_UADDR + offset,
        _ => address,
    }
}

/// `NAME=VALUE` of a line, decimal or hexadecimal.
fn field(said: &str, name: &str) -> Option<u64> {
    let word = said
        .split([' ', '[', ']'])
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
    number(word)
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

fn write(writer: &mut Writer, said: &str, moved: impl Fn(u64) -> u64) {
    let name = said.split(' ').next().unwrap_or_default().to_lowercase();
    let Some(number_of) = REQUEST_NAMES.iter().position(|known| *known == name) else {
        eprintln!("what is {said}?");
        return;
    };
    let flags = if said.contains("+NEED_REPLY") {
        VERSION | NEED_REPLY
    } else {
        VERSION
    };
    let has_fds = said.contains("fds=");
    let value = |name| moved(field(said, name).unwrap_or(0));
    let index = value("index");
    writer.request(number_of as u32, flags, has_fds);
    use request::*;
    match number_of as u32 {
        SET_FEATURES => {
            writer.u8(if said.contains("ACCESS_PLATFORM") { 0 } else { 1 });
        }
        SET_PROTOCOL_FEATURES => {
            writer.u8(2);
        }
        SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
            writer.u8(index as u8).value(value("num"));
        }
        SET_VRING_ADDR => {
            writer.u8(index as u8);
            for name in ["desc", "used", "avail", "log"] {
                writer.value(value(name));
            }
        }
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
            writer.u16(index as u16);
        }
        SET_MEM_TABLE => {
            let regions: Vec<&str> = said.split("gpa=").skip(1).collect();
            writer.u8(regions.len() as u8);
            for region in regions {
                let region = format!("gpa={region}");
                for name in ["gpa", "size", "uaddr", "off"] {
                    writer.value(moved(field(&region, name).unwrap_or(0)));
                }
            }
        }
        ADD_MEM_REG | REM_MEM_REG => {
            for name in ["gpa", "size", "uaddr", "off"] {
                writer.value(value(name));
            }
        }
        IOTLB_MSG => {
            let invalidates = said.contains("INVALIDATE");
            // QEMU leaves in `uaddr` of an INVALIDATE what its stack had.
            let uaddr = if invalidates { 0 } else { value("uaddr") };
            writer.value(value("iova")).value(value("size")).value(uaddr);
            let perm = match said.split("perm=").nth(1).map(str::trim) {
                Some("RO") => 1,
                Some("WO") => 2,
                Some("RW") => 3,
                _ => 0,
            };
            writer.u8(perm | if invalidates { 3 } else { 2 } << 4);
        }
        GET_CONFIG => {
            writer.value(value("offset")).value(value("size"));
        }
        _ => {}
    }
}
