//! What is sent, and what it does with names that somebody chose with care.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::sidecar::{Sidecar, finding, running, waiting};

/// The head and body of the answer to a plain request.
fn get(origin: &str, accept: &str) -> (String, String) {
    let mut stream = TcpStream::connect(origin.trim_start_matches("http://")).unwrap();
    write!(
        stream,
        "GET / HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn a_browser_gets_the_page_and_a_terminal_the_list() {
    let sidecar = Sidecar::saying(waiting());
    let (head, body) = get(
        &sidecar.origin,
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    );
    for field in [
        "HTTP/1.1 200 OK",
        "content-type: text/html; charset=utf-8",
        "content-security-policy: default-src 'none'; script-src 'sha256-",
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'",
        "referrer-policy: no-referrer",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "vary: accept",
    ] {
        assert!(head.contains(field), "{field}\n{head}");
    }
    assert!(body.starts_with("<!doctype html>"), "{body}");
    let (head, body) = get(&sidecar.origin, "*/*");
    assert!(
        head.contains("content-type: text/plain") && head.contains("vary: accept"),
        "{head}"
    );
    assert!(body.contains("/metrics"), "{body}");
}

#[test]
fn without_scripts_the_page_says_where_to_look() {
    let Some(browser) = Browser::start() else { return };
    let sidecar = Sidecar::saying(waiting());
    let tab = browser.tab(390);
    tab.call("Emulation.setScriptExecutionDisabled", json!({ "value": true }));
    tab.call("Page.navigate", json!({ "url": sidecar.origin }));
    tab.shows(
        "main",
        "This page needs JavaScript. The same as JSON is at /state",
    );
}

/// Puts markup into every text of a document, except where a text is one of a closed list.
fn poison(value: &mut Value, key: &str) {
    const CLOSED: [&str; 9] = [
        "state",
        "severity",
        "mode",
        "queue",
        "direction",
        "openedBy",
        "policy",
        "evidence",
        "outcome",
    ];
    match value {
        Value::String(text) if !CLOSED.contains(&key) => {
            *text = format!(
                "{text}<img src=x onerror=\"pwned = 1\"></code><script>pwned = 1</script>\" onfocus=\"pwned=1"
            );
        }
        Value::Array(values) => values.iter_mut().for_each(|value| poison(value, key)),
        Value::Object(values) => values.iter_mut().for_each(|(key, value)| poison(value, key)),
        _ => {}
    }
}

#[test]
fn markup_in_names_and_sentences_stays_text() {
    let Some(browser) = Browser::start() else { return };
    let mut state = finding();
    state["guests"]
        .as_array_mut()
        .unwrap()
        .push(running()["guests"][0].clone());
    state["guests"]
        .as_array_mut()
        .unwrap()
        .push(waiting()["guests"][0].clone());
    poison(&mut state, "");
    // An object that looks like what the script makes elements of is data as well.
    state["guests"][0]["session"]["peer"]["program"] =
        json!({ "tag": "img", "props": { "src": "x", "onerror": "pwned = 1" }, "kids": [], "text": "x" });
    let sidecar = Sidecar::saying(state.clone());
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    for guest in state["guests"].as_array().unwrap() {
        let link = format!(
            "[...document.querySelectorAll('.guests a')].find((link) => link.innerText === {})",
            guest["name"]
        );
        tab.eval(&format!("{link}.click()"));
        tab.until(&format!(
            "document.querySelector('#guest').innerText === {}",
            guest["name"]
        ));
        tab.eval("document.querySelectorAll('details').forEach((details) => { details.open = true })");
        if guest["session"]["connected"] == true {
            tab.until("document.querySelector('.log td') !== null");
            tab.shows(".rules", "<img src=x onerror=\"pwned = 1\"></code><script>");
            tab.shows("[aria-label=Connections]", "10.0.3.17:5432<img src=x");
        }
        let made =
            "document.querySelectorAll('img, iframe, object, #app script, [onerror], [onfocus]').length";
        assert_eq!(tab.eval(made), 0);
    }
    assert_eq!(tab.eval("typeof pwned"), "undefined");
    tab.is_clean(&sidecar.origin);
}

/// The second wall, should somebody ever make a hole into the first one.
#[test]
fn the_policy_lets_nothing_run_that_is_not_ours() {
    let Some(browser) = Browser::start() else { return };
    let (sidecar, stranger) = (Sidecar::saying(running()), Sidecar::saying(running()));
    let tab = browser.tab(1280);
    tab.open(&sidecar.origin);
    let refused = |expression: &str| {
        let tried = format!(
            "(async () => {{ try {{ await ({expression}); return 'done' }} catch (error) {{ return error.name }} }})()"
        );
        assert_eq!(tab.eval(&tried), "TypeError", "{expression}");
    };
    refused("document.body.innerHTML = '<b>x</b>'");
    refused("document.createElement('script').text = 'pwned = 1'");
    refused(&format!("fetch('{}/state')", stranger.origin));
    refused("fetch('https://example.invalid/')");
    tab.eval("{ const b = document.createElement('b'); b.setAttribute('style', 'position: fixed'); document.body.append(b); }");
    assert_eq!(
        tab.eval("getComputedStyle(document.querySelector('body > b')).position"),
        "static"
    );
    tab.eval("{ const f = document.createElement('iframe'); f.src = '/state'; document.body.append(f); }");
    tab.until("violations.some((violation) => violation.startsWith('frame-src'))");
    assert_eq!(stranger.asked(), 0);
    let kinds = tab.eval("[...new Set(violations.map((violation) => violation.split(':')[0]))].sort()");
    assert_eq!(
        kinds,
        json!([
            "connect-src",
            "frame-src",
            "require-trusted-types-for",
            "style-src-attr"
        ])
    );
}
