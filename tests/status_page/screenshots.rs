//! Pictures of the page in every state, in `target/status-page/`, to be looked at.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::browser::Browser;
use crate::sidecar::{Named, Sidecar, draining, finding, many, running, waiting, with_traffic};

#[test]
fn pictures_of_every_state_are_made() {
    let Some(browser) = Browser::start() else { return };
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .join("status-page");
    fs::create_dir_all(&dir).unwrap();
    let states: [Named; 5] = [
        ("waiting", waiting),
        ("running", running),
        ("finding", finding),
        ("many", many),
        ("draining", draining),
    ];
    for (name, state) in states {
        let sidecar = Sidecar::start(Box::new(move |n| with_traffic(state(), n)));
        let tab = browser.tab(1280);
        tab.open(&sidecar.origin);
        // As if it had been open for a while, so that there is something to plot.
        tab.fast_forward(Duration::from_secs(310));
        for scheme in ["light", "dark"] {
            for (device, width) in [("desktop", 1280), ("phone", 390)] {
                tab.size(width, 800);
                tab.prefers(scheme);
                let picture = decode(&tab.picture());
                assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n"), "{name}");
                fs::write(dir.join(format!("{name}-{scheme}-{device}.png")), picture).unwrap();
            }
        }
        assert!(
            sidecar.asked() > 100,
            "{name}: five minutes were asked for {} times",
            sidecar.asked()
        );
        tab.is_clean(&sidecar.origin);
        if name == "running" {
            tab.size(1280, 800);
            tab.prefers("light");
            tab.eval("document.querySelectorAll('details').forEach((details) => { details.open = true })");
            tab.fast_forward(Duration::from_secs(4));
            fs::write(dir.join("running-opened.png"), decode(&tab.picture())).unwrap();
            sidecar.hangs(true);
            tab.fast_forward(Duration::from_secs(4));
            fs::write(dir.join("running-stale.png"), decode(&tab.picture())).unwrap();
        }
    }
}

/// Base64 with padding, from a browser that makes no mistakes in it.
fn decode(text: &str) -> Vec<u8> {
    let six = |digit: u8| match digit {
        b'A'..=b'Z' => u32::from(digit - b'A'),
        b'a'..=b'z' => u32::from(digit - b'a') + 26,
        b'0'..=b'9' => u32::from(digit - b'0') + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits = text.trim_end_matches('=').as_bytes();
    let groups = digits.chunks(4).flat_map(|chunk| {
        let group = chunk
            .iter()
            .enumerate()
            .fold(0, |bits, (at, digit)| bits | six(*digit) << (18 - 6 * at));
        group.to_be_bytes()[1..chunk.len()].to_vec()
    });
    groups.collect()
}
