//! Text in one word of the control line: percent-encoding, as in URLs. Compiled into the guest's program and into ours.

/// One word without spaces, commas or control characters that stands for these bytes.
pub fn encode(bytes: &[u8]) -> String {
    let mut word = String::new();
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'/' | b'_' => {
                word.push(char::from(byte))
            }
            _ => word.push_str(&format!("%{byte:02x}")),
        }
    }
    word
}

/// The bytes that a word stands for; `None` if it is none of [`encode`]'s.
pub fn decode(word: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let [high, low, after @ ..] = rest else {
            return None;
        };
        let digit = |c: u8| char::from(c).to_digit(16);
        bytes.push((digit(*high)? * 16 + digit(*low)?) as u8);
        rest = after;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_carries_any_bytes() {
        let all: Vec<u8> = (0..=255).collect();
        let word = encode(&all);
        assert!(!word.contains([' ', ',', '=', ':', '\n']), "{word}");
        assert_eq!(decode(&word), Some(all));
        assert_eq!(encode(b"GET / HTTP/1.1\r\n"), "GET%20/%20HTTP/1.1%0d%0a");
        for broken in ["%", "%4", "a%zz"] {
            assert_eq!(decode(broken), None, "{broken}");
        }
    }
}
