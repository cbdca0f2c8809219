//! That the page can be read: on a phone, in the dark, with a keyboard, by a screen reader.

use serde_json::json;

use crate::browser::{Browser, Tab};
use crate::sidecar::{Named, Sidecar, device_silent, draining, finding, many, running, waiting};

const STATES: [Named; 6] = [
    ("waiting", waiting),
    ("running", running),
    ("finding", finding),
    ("many", many),
    ("draining", draining),
    ("device silent", device_silent),
];

fn open_everything(tab: &Tab<'_>) {
    tab.eval("document.querySelectorAll('details').forEach((details) => { details.open = true })");
    tab.until("!document.querySelector('.recorder') || document.querySelector('.log') !== null");
}

#[test]
fn no_state_makes_a_phone_scroll_sideways() {
    let Some(browser) = Browser::start() else { return };
    for (name, state) in STATES {
        let mut state = state();
        state["guests"][0]["name"] =
            "a-guest-with-a-very-long-name-that-has-no-space-in-it-whatsoever.example".into();
        let sidecar = Sidecar::saying(state);
        let tab = browser.tab(360);
        tab.open(&sidecar.origin);
        open_everything(&tab);
        for width in [320, 360, 736, 1280] {
            tab.size(width, 800);
            let wide = tab.eval(
                "document.documentElement.scrollWidth <= innerWidth ? [] :
                 [...document.querySelectorAll('body *')].filter((node) => node.getBoundingClientRect().right > innerWidth)
                   .map((node) => node.tagName + '.' + node.className).slice(0, 9)",
            );
            assert_eq!(wide, json!([]), "{name} at {width}");
        }
        tab.is_clean(&sidecar.origin);
    }
}

/// WCAG 2.2, 1.4.3: text has a contrast of 4.5 to 1 to what is behind it.
#[test]
fn every_text_stands_out_from_its_background_in_light_and_dark() {
    let Some(browser) = Browser::start() else { return };
    let mut pages = Vec::new();
    for (name, state) in STATES {
        let sidecar = Sidecar::saying(state());
        let tab = browser.tab(1280);
        tab.open(&sidecar.origin);
        open_everything(&tab);
        for scheme in ["light", "dark"] {
            tab.prefers(scheme);
            let faint = tab.eval(
                "(() => {
                   const parts = (color) => color.match(/[\\d.]+/g).map(Number);
                   const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
                   const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
                   const behind = (node) => {
                     for (; node; node = node.parentElement) {
                       const color = parts(getComputedStyle(node).backgroundColor);
                       if (color.length === 3 || color[3] === 1) return color;
                     }
                     return [255, 255, 255];
                   };
                   const faint = new Set();
                   const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
                   while (walker.nextNode()) {
                     const node = walker.currentNode.parentElement;
                     if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('script, style')) continue;
                     const color = parts(getComputedStyle(node).color);
                     const [low, high] = [light(color), light(behind(node))].sort((a, b) => a - b);
                     const contrast = (high + 0.05) / (low + 0.05);
                     if (contrast < 4.5) faint.add(`${node.tagName}.${node.className} ${contrast.toFixed(2)}`);
                   }
                   return [...faint];
                 })()",
            );
            assert_eq!(faint, json!([]), "{name}, {scheme}");
            pages.push(tab.eval("getComputedStyle(document.body).backgroundColor"));
        }
    }
    assert_ne!(pages[0], pages[1], "dark is not light");
}

#[test]
fn a_keyboard_reaches_everything_in_the_order_of_the_page() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(many());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    // Without motion: what takes the focus is there at once.
    tab.prefers("light");
    tab.eval("window.visited = []");
    let mut names = Vec::new();
    for _ in 0..100 {
        tab.press("Tab");
        let step = tab.eval(
            "(() => {
               const node = document.activeElement;
               if (node === document.body || visited.includes(node)) return null;
               const follows = visited.length === 0 || Boolean(visited.at(-1).compareDocumentPosition(node) & 4);
               visited.push(node);
               const { outlineStyle, outlineWidth } = getComputedStyle(node);
               const box = node.getBoundingClientRect();
               return { name: node.getAttribute('aria-label') ?? node.innerText, follows, ring: outlineStyle !== 'none' && outlineWidth !== '0px',
                        seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight };
             })()",
        );
        if step.is_null() {
            break;
        }
        assert_eq!(
            (&step["follows"], &step["ring"], &step["seen"]),
            (&json!(true), &json!(true), &json!(true)),
            "{step}"
        );
        names.push(step["name"].as_str().unwrap().to_owned());
    }
    assert_eq!(names[..4], ["Skip to content", "Pause", "Guests", "web"]);
    for wanted in [
        "1 finding no longer active",
        "27 requests since the process began",
        "Connections",
        "/state",
    ] {
        assert!(names.iter().any(|name| name == wanted), "{wanted}: {names:?}");
    }
    assert_eq!(names.last().map(String::as_str), Some("/startupz"));

    // A key opens what a click opens.
    tab.eval("document.querySelector('.recorder summary').focus()");
    tab.press("Enter");
    tab.until("document.querySelector('.log') !== null");
    tab.eval("document.querySelector('.skip').focus()");
    tab.press("Enter");
    tab.until("document.activeElement.id === 'main'");
    tab.is_clean(&sidecar.origin);
}

#[test]
fn a_screen_reader_finds_landmarks_headings_and_names() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(many());
    // Also where style sheets make blocks of table rows.
    for width in [1280, 360] {
        let tab = browser.tab(width);
        tab.open(&sidecar.origin);
        open_everything(&tab);
        let tree = tab.call("Accessibility.getFullAXTree", json!({}));
        let nodes: Vec<(&str, &str)> = tree["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|node| node["ignored"] == false)
            .map(|node| {
                (
                    node["role"]["value"].as_str().unwrap_or(""),
                    node["name"]["value"].as_str().unwrap_or(""),
                )
            })
            .collect();
        let count = |role: &str| nodes.iter().filter(|(found, _)| *found == role).count();
        for landmark in ["banner", "main", "contentinfo"] {
            assert_eq!(count(landmark), 1, "{landmark}");
        }
        assert_eq!(count("navigation"), 2);
        assert_eq!(count("status"), 1);
        for (role, least) in [
            ("table", 7),
            ("rowheader", 40),
            ("columnheader", 30),
            ("image", 2),
            ("region", 6),
            ("button", 1),
        ] {
            assert!(count(role) >= least, "{role}: {}", count(role));
        }
        for (role, name) in &nodes {
            let must = [
                "table",
                "link",
                "button",
                "image",
                "region",
                "navigation",
                "heading",
                "DisclosureTriangle",
            ];
            assert!(
                !must.contains(role) || !name.trim().is_empty(),
                "a {role} without a name at {width}"
            );
        }
        let throughput = nodes
            .iter()
            .find(|(role, name)| *role == "image" && name.starts_with("Throughput"))
            .unwrap();
        assert!(throughput.1.contains("from guest to host"), "{throughput:?}");
        // Marks say in words what they say in shapes.
        let marks = tab
            .eval("[...document.querySelectorAll('.mark')].every((mark) => mark.textContent.trim() !== '')");
        assert_eq!(marks, true);
        let levels = tab.eval(
            "[...document.querySelectorAll('h1, h2, h3, h4')].map((heading) => Number(heading.tagName[1]))",
        );
        let levels: Vec<i64> = levels
            .as_array()
            .unwrap()
            .iter()
            .map(|level| level.as_i64().unwrap())
            .collect();
        assert_eq!(levels[0], 1);
        assert!(
            levels.windows(2).all(|pair| pair[1] <= pair[0] + 1),
            "a level is left out: {levels:?}"
        );
        let ids = tab.eval("(() => { const ids = [...document.querySelectorAll('[id]')].map((node) => node.id); return ids.length - new Set(ids).size })()");
        assert_eq!(ids, 0, "identifiers that are there twice");
        tab.is_clean(&sidecar.origin);
    }
}
