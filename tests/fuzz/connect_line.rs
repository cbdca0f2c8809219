//! The CONNECT line, cut into any pieces, against a reader of whole texts.
//!
//! ```text
//! case = n, cut*n, bytes      where the pieces end
//! ```

use vsock_sidecar::host::handshake::{ConnectLine, MAX_LINE, Rejection};

use super::input::Input;

/// Runs a case; panics where the reader breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut cuts: Vec<usize> = (0..input.below(8)).map(|_| input.u8().into()).collect();
    let bytes = input.rest();
    cuts.retain(|cut| *cut < bytes.len());
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();

    let mut line = ConnectLine::default();
    let mut end = None;
    let mut taken = 0;
    for piece in cuts.windows(2) {
        taken = piece[1];
        end = line.push(&bytes[piece[0]..taken]);
        if end.is_some() {
            break;
        }
    }
    let expected = expected(&bytes[..taken]);
    // What is said of a line does not depend on the pieces: the rest of the bytes changes nothing any more.
    if end.is_some() {
        assert_eq!(
            expected.as_ref().map(|end| end.as_ref().map(|(port, _)| *port)),
            self::expected(bytes)
                .as_ref()
                .map(|end| end.as_ref().map(|(port, _)| *port))
        );
    }
    match (end, expected) {
        (None, None) => assert!(taken <= MAX_LINE),
        (Some(Ok(wanted)), Some(Ok((port, preface)))) => {
            assert_eq!((wanted.port, &wanted.preface[..]), (port, preface));
        }
        (Some(Err(rejection)), Some(Err(why))) => assert_eq!(rejection, why),
        (end, expected) => panic!("{end:?} instead of {expected:?}"),
    }
}

/// What the bytes mean: a port and what follows the line, a reason, or that there is more to come.
fn expected(bytes: &[u8]) -> Option<Result<(u32, &[u8]), Rejection>> {
    let Some(newline) = bytes.iter().position(|byte| *byte == b'\n') else {
        return (bytes.len() > MAX_LINE).then_some(Err(Rejection::TooLong));
    };
    if newline > MAX_LINE {
        return Some(Err(Rejection::TooLong));
    }
    // Latin-1 keeps every byte apart from the others.
    let line: String = bytes[..newline].iter().map(|byte| char::from(*byte)).collect();
    let words: Vec<&str> = line
        .split([' ', '\t', '\r', '\x0c'])
        .filter(|word| !word.is_empty())
        .collect();
    Some(match words[..] {
        [word, port] if word.eq_ignore_ascii_case("CONNECT") => number(port)
            .map(|port| (port, &bytes[newline + 1..]))
            .ok_or(Rejection::BadPort),
        _ => Err(Rejection::NotConnect),
    })
}

fn number(word: &str) -> Option<u32> {
    let mut value = 0u64;
    for c in word.chars() {
        value = value
            .saturating_mul(10)
            .saturating_add(c.to_digit(10).filter(|_| c.is_ascii())?.into());
    }
    (1..=0xffff_fffe).contains(&value).then_some(value as u32)
}
