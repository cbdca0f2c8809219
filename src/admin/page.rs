//! The status page: `/state` for people, as one document without anything from elsewhere.
//!
//! Names in it come from configuration, VMM and guest, so the page must not be able to take data for markup. Its policy says
//! that to the browser: only this very script and this very style sheet (by their hashes, which are computed from what is
//! sent and so cannot drift from it), questions to the same origin only, and no string that becomes markup or code
//! (`require-trusted-types-for`). The sources are in `page/`.

use std::sync::LazyLock;

use hyper::header::HeaderValue;
use sha2::{Digest, Sha256};

const HTML: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
/// One script, in one scope of its own. The order matters: `main.js` starts it.
const SCRIPT: &str = concat!(
    "(() => {\n'use strict';\n",
    include_str!("page/dom.js"),
    include_str!("page/model.js"),
    include_str!("page/plot.js"),
    include_str!("page/view.js"),
    include_str!("page/main.js"),
    "})();\n",
);

/// The page as it is sent.
pub(super) struct Page {
    /// The document.
    pub(super) html: String,
    /// Its Content-Security-Policy.
    pub(super) policy: HeaderValue,
}

/// The page; it is the same for everybody, so it is put together once.
pub(super) fn page() -> &'static Page {
    static PAGE: LazyLock<Page> = LazyLock::new(|| {
        let (style, script) = (tight(STYLE), tight(SCRIPT));
        Page {
            html: HTML
                .replacen("{style}", &style, 1)
                .replacen("{script}", &script, 1),
            policy: policy(&style, &script),
        }
    });
    &PAGE
}

/// Source text without indentation and without lines that are comments: what is for us need not be sent. No string of the
/// sources spans lines.
fn tight(source: &str) -> String {
    let lines = source.lines().map(str::trim_start);
    let kept = lines.filter(|line| !line.is_empty() && !line.starts_with("//"));
    kept.flat_map(|line| [line, "\n"]).collect()
}

fn policy(style: &str, script: &str) -> HeaderValue {
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        base64(&Sha256::digest(script)),
        base64(&Sha256::digest(style)),
    );
    // Without a policy that can be sent the page gets one that lets nothing run.
    HeaderValue::try_from(policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"))
}

/// Base64 with padding (RFC 4648, section 4), as policies spell hashes.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let six = group >> (18 - 6 * digit) & 0x3f;
            // A chunk of n bytes has n + 1 digits.
            let known = (digit as usize) <= chunk.len();
            text.push(match DIGITS.get(six as usize) {
                Some(&digit) if known => char::from(digit),
                _ => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    /// A browser hashes what stands between the tags, so nothing may be added there or be taken for the end of it.
    #[test]
    fn what_the_policy_allows_is_what_stands_in_the_page() {
        let (html, policy) = (&page().html, page().policy.to_str().unwrap());
        for (tag, kind) in [("script", "script-src"), ("style", "style-src")] {
            let (_, rest) = html.split_once(&format!("<{tag}>")).unwrap();
            let (inside, _) = rest.split_once(&format!("</{tag}>")).unwrap();
            let expected = format!("{kind} 'sha256-{}';", base64(&Sha256::digest(inside)));
            assert!(policy.contains(&expected), "{tag}: {policy}");
        }
        assert!(!policy.contains("unsafe"));
    }

    #[test]
    fn no_string_of_the_script_spans_lines() {
        for line in SCRIPT.lines().filter(|line| !line.trim_start().starts_with("//")) {
            assert_eq!(line.matches('`').count() % 2, 0, "{line}");
        }
        assert!(!SCRIPT.contains("/*"), "block comments would be kept");
    }

    #[test]
    fn the_page_is_small_and_needs_nothing_from_elsewhere() {
        let html = &page().html;
        assert!(html.len() < 60_000, "{} bytes", html.len());
        let addresses: Vec<_> = html
            .match_indices("://")
            .map(|(at, _)| {
                html[..at + 3]
                    .rsplit([' ', '\'', '"', '`', '='])
                    .next()
                    .unwrap_or_default()
            })
            .collect();
        // The one name space that browsers know by heart, in the icon and in the script.
        assert!(
            addresses.iter().all(|address| *address == "http://"),
            "{addresses:?}"
        );
        assert_eq!(
            html.matches("http://www.w3.org/2000/svg").count(),
            addresses.len()
        );
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "@import",
            "url(",
        ] {
            assert!(!html.contains(way), "{way}");
        }
    }
}
