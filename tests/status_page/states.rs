//! What the page shows of each state, and how it behaves while states come and go.

use std::time::Duration;

use serde_json::{Value, json};

use crate::browser::{Browser, Tab};
use crate::sidecar::{
    Sidecar, device_silent, draining, finding, many, reloaded, running, waiting, with_traffic,
};

/// The text of every cell in the row of a table that begins with `head`.
fn row(tab: &Tab<'_>, table: &str, head: &str) -> Vec<String> {
    let cells = tab.eval(&format!(
        "[...document.querySelectorAll({} + ' tr')].map((row) => [...row.children].map((cell) => cell.textContent.trim()))
         .find((cells) => cells[0].startsWith({})) ?? []",
        json!(table),
        json!(head)
    ));
    cells
        .as_array()
        .unwrap()
        .iter()
        .map(|cell| cell.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_guest_that_waits_shows_where_a_vmm_would_connect_and_how() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(waiting());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows("header.guest", "web Waiting CID 3");
    tab.shows(".steps [aria-current=step]", "Waiting for a VMM");
    tab.shows("main", "listens on /run/vsock-sidecar/web.sock");
    tab.shows(
        "main",
        "Session 1 ended: the VMM closed the connection after it had stopped its rings",
    );
    tab.eval("document.querySelector('article details summary').click()");
    tab.shows(
        "pre",
        "-chardev socket,id=vsock0,path=/run/vsock-sidecar/web.sock",
    );
    tab.shows("main", "None are open.");
    assert_eq!(tab.text(".matrix"), "", "nothing is agreed with nobody");
    assert_eq!(tab.eval("document.title"), "vsock-sidecar");
    tab.is_clean(&sidecar.origin);
}

#[test]
fn a_running_guest_shows_all_that_was_negotiated() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(running());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows(
        "header.guest",
        "web Running CID 3 · qemu-system-x86 · connected 9 min 6 s",
    );
    tab.shows(".meta", "version 0.1.0 3db13e0a9c51 up 2 h 10 min");
    let matrix: Vec<_> = ["stream", "seqpacket", "protocol_features", "access_platform"]
        .map(|feature| row(&tab, ".matrix", feature)[1..].join(" "))
        .into();
    assert_eq!(
        matrix,
        [
            "yes yes yes yes",
            "yes no no no",
            "yes yes no yes",
            "yes yes yes yes"
        ]
    );
    assert_eq!(tab.text(".chip.taken"), "mq acknowledged");
    assert_eq!(tab.text(".chip.left"), "configure_mem_slots offered only");

    tab.shows("main", "Translated by the IOTLB accessPlatform: auto");
    tab.shows(
        "main",
        "The VMM sent an IOTLB message, so addresses are I/O virtual addresses evidence: iotlb_message",
    );
    tab.shows("main", "212 of at most 8 192, 3.3 MiB");
    // Never rounded up to "all of them".
    tab.shows("main", "99.99 % of 9 120 400 lookups");
    assert_eq!(
        row(&tab, ".rings", "State")[1..],
        ["running", "running", "running"]
    );
    assert_eq!(row(&tab, ".rings", "Addresses")[1..], ["I/O virtual"; 3]);
    assert_eq!(row(&tab, ".rings", "Descriptors")[1], "0x40000000");
    tab.shows("main", "4.0 GiB in 2 regions");
    tab.shows("main", "qemu-system-x86 pid 4711, uid 107, gid 107");

    assert_eq!(
        row(&tab, ".rules", "outbound apps")[1..5],
        ["guest ports 8000–8099 → tcp://127.0.0.1:8000", "3", "881", "12"]
    );
    assert_eq!(
        row(&tab, ".rules", "inbound ssh")[1],
        "tcp://0.0.0.0:2222 → guest port 22"
    );
    tab.shows("main", "25 of 40");
    let connections = "document.querySelectorAll('[aria-label=Connections] tbody tr').length";
    assert_eq!(tab.eval(connections), 25);
    tab.eval("[...document.querySelectorAll('button')].find((button) => button.innerText === 'Show 15 more').click()");
    assert_eq!(tab.eval(connections), 40);

    tab.eval("document.querySelector('.recorder summary').click()");
    tab.shows(".recorder", "SET_MEM_TABLE");
    tab.shows(".log", "IOTLB_MSG × 48 210 UPDATE 0x40012000 + 0x1000 r ok");
    tab.shows(".log", "device → VMM, backend channel");
    tab.is_clean(&sidecar.origin);
}

#[test]
fn rates_are_what_counters_gained_over_the_time_between_two_answers() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::start(Box::new(|n| {
        let mut state = running();
        // A rule that is new gains as fast as the first, and rules that share one counter count once.
        let rules = state["guests"][0]["outbound"].as_array_mut().unwrap();
        rules.truncate(1);
        let mut last = rules[0].clone();
        rules[0]["traffic"]["bytesGuestToHost"] = json!(n * 10_000_000);
        for name in ["x", "y"] {
            last["name"] = name.into();
            last["traffic"] = json!({ "active": 0, "opened": 0, "refused": 0, "bytesGuestToHost": n * 10_000_000,
                                      "bytesHostToGuest": 0, "shared": true });
            rules.push(last.clone());
        }
        state
    }));
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    assert_eq!(
        tab.text(".bigs .big:first-child dd").split(' ').next(),
        Some("–"),
        "one answer is no rate"
    );
    tab.fast_forward(Duration::from_secs(61));
    let rate = |text: String| text.split(' ').next().unwrap().parse::<f64>().unwrap();
    // Ten megabytes in two seconds and a little, for each of two counters.
    let (one, all) = (
        rate(row(&tab, ".rules", "outbound db")[5].clone()),
        rate(tab.text(".bigs .big:first-child dd")),
    );
    assert!((4.0..=5.1).contains(&one), "{one} MB/s");
    assert!((8.0..=10.2).contains(&all), "{all} MB/s");
    let line = tab.eval("document.querySelector('.plot .line.up').getAttribute('d')");
    assert!(line.as_str().unwrap().matches('L').count() > 20, "{line}");
    tab.is_clean(&sidecar.origin);
}

#[test]
fn findings_stand_on_top_the_gravest_first_with_what_to_do() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(finding());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    let codes =
        tab.eval("[...document.querySelectorAll('.findings > ul code')].map((code) => code.innerText)");
    assert_eq!(
        codes,
        json!([
            "memory-not-shared",
            "access-platform-without-iotlb",
            "seqpacket-dropped"
        ])
    );
    tab.shows(
        ".finding.error",
        "Error: the descriptor table of ring tx is all zero",
    );
    tab.shows(
        ".finding.error",
        "What to do: Share the guest's memory: QEMU memory-backend-memfd with share=on",
    );
    tab.shows(
        ".finding.warning",
        "Warning: crosvm (pid 812) acknowledged access_platform",
    );
    tab.shows(".finding.info", "Note: seqpacket was offered");
    tab.shows(".findings summary", "1 finding no longer active");
    let first = "document.querySelector('.findings').compareDocumentPosition(document.querySelector('article .card')) & 4";
    assert_eq!(
        tab.eval(first),
        4,
        "findings come before everything else of the guest"
    );
    assert_eq!(tab.eval("document.title"), "1 error · vsock-sidecar");
    assert_eq!(
        row(&tab, ".rings", "State")[1..],
        ["running", "broken", "running"]
    );
    assert_eq!(
        row(&tab, ".matrix", "access_platform")[1..].join(" "),
        "yes yes yes no",
        "not in effect"
    );
    tab.is_clean(&sidecar.origin);
}

#[test]
fn of_many_guests_the_one_in_trouble_is_shown_and_links_lead_to_the_others() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(many());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows("nav[aria-label=Guests]", "10 guests");
    assert_eq!(row(&tab, ".guests", "android")[7], "3 findings");
    tab.shows("#guest", "android");
    tab.eval(
        "[...document.querySelectorAll('.guests a')].find((link) => link.innerText === 'worker-1').click()",
    );
    tab.shows("#guest", "worker-1");
    tab.until("document.activeElement.id === 'guest'");
    tab.shows(".guests a[aria-current=true]", "worker-1");
    // The address leads to the same guest again, and the way back works.
    tab.call("Page.reload", json!({}));
    tab.shows("#guest", "worker-1");
    tab.eval("location.hash = '#guest=web'");
    tab.shows("#guest", "web");
    tab.eval("history.back()");
    tab.shows("#guest", "worker-1");
    // A guest that is gone leaves the page with another one.
    sidecar.says(running());
    tab.shows("#guest", "web");
    tab.is_clean(&sidecar.origin);
}

#[test]
fn a_drain_and_a_device_thread_that_does_not_answer_are_said() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(draining());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows(".banner", "Draining. The sidecar is shutting down");
    sidecar.says(device_silent());
    tab.shows("article .banner", "The device thread did not answer in time");
    tab.until("!document.querySelector('#app').innerText.includes('Draining')");
    tab.shows(".rings", "running");
    assert_eq!(row(&tab, ".rings", "Next used")[1], "–");
    tab.is_clean(&sidecar.origin);
}

/// Who looks at the page because a change does not work must not have to read the log first.
#[test]
fn a_configuration_that_is_refused_or_waits_is_told() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(reloaded());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows(
        ".banner.bad",
        "The configuration is refused. What ran before stays in use.",
    );
    tab.shows(".banner.bad", "config.yaml:3:9: guests: `7` is of the wrong type");
    tab.shows(".banner.bad", "3 | guests: <b>7</b>");
    tab.shows("#app", "Not in effect yet.");
    tab.shows(
        "#app",
        "log.format: text -> json (needs a restart of the sidecar)",
    );
    tab.shows(".meta", "configuration 0123456789ab since");
    tab.is_clean(&sidecar.origin);
    sidecar.says(running());
    tab.until("!document.querySelector('.banner')");
}

#[test]
fn a_sidecar_without_guests_says_so() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(json!({ "guests": [] }));
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.shows("main", "No guests are configured.");
    tab.is_clean(&sidecar.origin);
}

/// What was true an hour ago must not look like what is true now.
#[test]
fn answers_that_stop_are_said_and_their_return_is_seen() {
    let Some(browser) = Browser::start() else { return };
    let mut sidecar = Sidecar::saying(running());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    sidecar.hangs(true);
    tab.shows(
        ".banner.bad",
        "Not up to date. The sidecar answers 503, no answer within 100 ms. What you see is of ",
    );
    tab.shows(".status", "No answer");
    tab.shows("#live", "No answer: The sidecar answers 503");
    tab.shows("#guest", "web");
    assert_eq!(tab.eval("document.title"), "No answer · vsock-sidecar");
    sidecar.hangs(false);
    tab.eval("document.querySelector('.banner button').click()");
    tab.shows(".status", "Live");
    tab.shows("#live", "The sidecar answers again.");
    tab.until("!document.querySelector('.banner')");

    sidecar.stop();
    tab.shows(".banner.bad", "Not up to date. The sidecar cannot be reached.");
}

#[test]
fn it_asks_less_often_while_nobody_answers() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(running());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    let before = sidecar.asked();
    tab.fast_forward(Duration::from_secs(100));
    let answered = sidecar.asked() - before;
    sidecar.hangs(true);
    let before = sidecar.asked();
    tab.fast_forward(Duration::from_secs(100));
    let unanswered = sidecar.asked() - before;
    assert!(answered > 40, "{answered}");
    // After 4, 8, 16, 30 and 30 seconds, and one that was due.
    assert!((3..=8).contains(&unanswered), "{unanswered}");
}

#[test]
fn it_does_not_ask_while_nobody_looks_or_it_is_paused() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(running());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    let hidden = |hidden: bool| {
        tab.eval(&format!(
            "Object.defineProperty(document, 'hidden', {{ configurable: true, value: {hidden} }});
             document.dispatchEvent(new Event('visibilitychange'))"
        ));
    };
    let button = "document.querySelector('.status button')";
    for (stop, go) in [
        (&(|| hidden(true)) as &dyn Fn(), &(|| hidden(false)) as &dyn Fn()),
        (&|| drop(tab.eval(&format!("{button}.click()"))), &|| {
            drop(tab.eval(&format!("{button}.click()")))
        }),
    ] {
        stop();
        // One question may have been under way.
        let before = sidecar.asked();
        tab.fast_forward(Duration::from_secs(60));
        assert!(sidecar.asked() <= before + 1);
        let before = sidecar.asked();
        go();
        tab.fast_forward(Duration::from_secs(10));
        assert!(sidecar.asked() >= before + 3);
    }
    tab.is_clean(&sidecar.origin);
}

#[test]
fn a_poll_leaves_alone_what_the_reader_does() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::start(Box::new(|n| {
        let mut state = with_traffic(running(), n);
        // Connections come and go, and messages are added.
        let device = &mut state["guests"][0]["device"];
        device["connections"].as_array_mut().unwrap().remove(n % 20);
        let messages = state["guests"][0]["session"]["messages"].as_array_mut().unwrap();
        let mut more = messages[0].clone();
        for number in 0..n {
            more["at"] = json!(1_795_379_700 + number);
            messages.push(more.clone());
        }
        state
    }));
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.eval("document.querySelector('.recorder summary').click()");
    tab.until("document.querySelector('.log') !== null");
    tab.eval(
        "const log = document.querySelector('.log');
         log.scrollTop = 40;
         window.nodes = [log, document.querySelector('.matrix tbody tr'), document.querySelector('#guest')];
         document.querySelector('.recorder summary').focus();
         window.focused = document.activeElement;
         getSelection().selectAllChildren(document.querySelector('.seen, .mode code'));
         window.selection = String(getSelection());
         scrollTo(0, 300)",
    );
    let before = sidecar.asked();
    tab.fast_forward(Duration::from_secs(30));
    assert!(sidecar.asked() > before + 10);
    for holds in [
        "document.querySelector('.recorder').open",
        "nodes[0] === document.querySelector('.log') && nodes[0].scrollTop === 40",
        "nodes.every((node) => node.isConnected)",
        "focused.tagName === 'SUMMARY' && document.activeElement === focused",
        "selection === 'auto' && String(getSelection()) === selection",
        "scrollY === 300",
        // Nothing is read out: nothing changed that anybody waits for.
        "document.querySelector('#live').innerText === ''",
    ] {
        assert_eq!(tab.eval(holds), true, "{holds}");
    }
    // Who reads the log at its end goes on at its end.
    tab.eval("nodes[0].scrollTop = nodes[0].scrollHeight");
    let rows = tab
        .eval("nodes[0].querySelectorAll('tr').length")
        .as_u64()
        .unwrap();
    tab.fast_forward(Duration::from_secs(10));
    assert!(
        tab.eval("nodes[0].querySelectorAll('tr').length")
            .as_u64()
            .unwrap()
            > rows
    );
    assert_eq!(
        tab.eval("nodes[0].scrollHeight - nodes[0].scrollTop - nodes[0].clientHeight < 4"),
        true
    );
    tab.is_clean(&sidecar.origin);
}

#[test]
fn a_change_is_read_out_once() {
    let Some(browser) = Browser::start() else { return };
    let mut state = finding();
    let guest = &mut state["guests"][0]["session"];
    let findings = guest["findings"].take();
    guest["findings"] = json!([]);
    let sidecar = Sidecar::saying(state.clone());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.eval(
        "window.said = [];
         new MutationObserver(() => said.push(document.querySelector('#live').innerText))
           .observe(document.querySelector('#live'), { childList: true, subtree: true, characterData: true })",
    );
    state["guests"][0]["session"]["findings"] = findings;
    sidecar.says(state.clone());
    tab.shows("#live", "android: Error: the descriptor table of ring tx");
    state["guests"][0]["session"]["state"] = "negotiated".into();
    sidecar.says(state);
    tab.shows("#live", "android: Negotiated");
    let before = sidecar.asked();
    tab.fast_forward(Duration::from_secs(20));
    assert!(sidecar.asked() > before + 5);
    let said = tab.eval("said.filter((words) => words.includes('descriptor table')).length");
    assert_eq!(said, 1);
    tab.is_clean(&sidecar.origin);
}

/// A page stays open while the sidecar is replaced by an older or a newer one.
#[test]
fn whatever_is_missing_or_of_another_kind_breaks_nothing() {
    let Some(browser) = Browser::start() else { return };
    let mut base = finding();
    base["guests"]
        .as_array_mut()
        .unwrap()
        .push(running()["guests"][0].clone());
    // Long lists repeat themselves.
    for guest in base["guests"].as_array_mut().unwrap() {
        guest["device"]["connections"].as_array_mut().unwrap().truncate(2);
        guest["session"]["requests"].as_array_mut().unwrap().truncate(2);
        guest["session"]["messages"].as_array_mut().unwrap().truncate(2);
        guest["session"]["features"].as_array_mut().unwrap().truncate(2);
    }
    let mut paths = Vec::new();
    collect(&base, String::new(), &mut paths);
    let count = paths.len();
    let sidecar = Sidecar::start(Box::new(move |n| {
        let mut state = base.clone();
        let path = &paths[n % paths.len()];
        let (parent, key) = path.rsplit_once('/').unwrap();
        let parent = state.pointer_mut(parent).unwrap();
        // Twice round: gone, and then something else.
        match (n / paths.len(), parent) {
            (0, Value::Object(parent)) => drop(parent.remove(key)),
            (0, parent) => parent[key.parse::<usize>().unwrap()] = Value::Null,
            (round, _) => {
                *state.pointer_mut(path).unwrap() =
                    [json!("word"), json!(7), json!({})][(n + round) % 3].clone()
            }
        }
        state
    }));
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    tab.eval("document.querySelectorAll('details').forEach((details) => { details.open = true })");
    while sidecar.asked() < 2 * count {
        tab.fast_forward(Duration::from_secs(200));
        tab.is_clean(&sidecar.origin);
    }
}

/// The paths of everything in a document.
fn collect(value: &Value, path: String, paths: &mut Vec<String>) {
    if !path.is_empty() {
        paths.push(path.clone());
    }
    match value {
        Value::Object(object) => object
            .iter()
            .for_each(|(key, value)| collect(value, format!("{path}/{key}"), paths)),
        Value::Array(array) => {
            array
                .iter()
                .enumerate()
                .for_each(|(at, value)| collect(value, format!("{path}/{at}"), paths));
        }
        _ => {}
    }
}
