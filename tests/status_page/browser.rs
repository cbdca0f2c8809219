//! A headless Chromium, driven by the DevTools protocol over `--remote-debugging-pipe`: messages are JSON, each ended by a
//! NUL, on descriptor 3 to the browser and 4 from it. No port and no web socket is needed.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longer than anything here takes, shorter than a CI job's patience.
pub const LONG: Duration = Duration::from_secs(60);
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// A browser process; ends when dropped.
pub struct Browser {
    child: Child,
    input: RefCell<ChildStdin>,
    output: Receiver<Value>,
    events: RefCell<Vec<Value>>,
    calls: Cell<u64>,
    profile: tempfile::TempDir,
}

impl Browser {
    /// Starts one. Where no browser is installed this fails in CI, which installs it, and says so elsewhere.
    pub fn start() -> Option<Browser> {
        let found = PROGRAMS.iter().find(|program| {
            let mut version = Command::new(program);
            version
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            version.status().is_ok_and(|status| status.success())
        });
        let Some(program) = found else {
            let advice = "cannot run chromium; install it with tests/setup.sh, or: apt-get install chromium";
            assert!(std::env::var_os("CI").is_none(), "{advice}");
            eprintln!("NOT TESTED: {advice}");
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        // Standard input and output become descriptors 3 and 4.
        command
            .args([
                "-c",
                r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null"#,
                "sh",
                program,
            ])
            .args([
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-extensions",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--force-color-profile=srgb",
                // Nothing of the browser's own looks for other hosts.
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ]);
        // Chromium's sandbox refuses to work for root.
        if rustix::process::geteuid().is_root() {
            command.arg("--no-sandbox");
        }
        let mut child = command
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(profile.path().join("stderr.log")).unwrap())
            .spawn()
            .unwrap();
        let input = RefCell::new(child.stdin.take().unwrap());
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            while matches!(stdout.read_until(0, &mut bytes), Ok(1..)) {
                bytes.pop();
                let Ok(message) = serde_json::from_slice(&bytes) else {
                    return;
                };
                if sender.send(message).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        Some(Browser {
            child,
            input,
            output,
            events: RefCell::default(),
            calls: Cell::new(0),
            profile,
        })
    }

    fn send(&self, id: u64, session: Option<&str>, method: &str, params: Value) {
        let mut message = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let mut input = self.input.borrow_mut();
        let written = write!(input, "{message}\0").and_then(|()| input.flush());
        written.unwrap_or_else(|error| panic!("{method}: {error}\n{}", self.log()));
    }

    fn call(&self, session: Option<&str>, method: &str, params: Value) -> Value {
        let id = self.calls.get() + 1;
        self.calls.set(id);
        self.send(id, session, method, params);
        let answer = self.wait(method, |message| message["id"] == id);
        assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        answer["result"].clone()
    }

    /// Reads messages until one is wanted; the others are kept.
    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LONG;
        loop {
            let message = self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .unwrap_or_else(|error| panic!("{what}: {error}\n{}", self.log()));
            self.events.borrow_mut().push(message.clone());
            if wanted(&message) {
                return message;
            }
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.profile.path().join("stderr.log")).unwrap_or_default()
    }

    /// A tab with nothing in it, `width` pixels wide.
    pub fn tab(&self, width: u32) -> Tab<'_> {
        let target = self.call(None, "Target.createTarget", json!({ "url": "about:blank" }));
        let attached = self.call(
            None,
            "Target.attachToTarget",
            json!({ "targetId": target["targetId"], "flatten": true }),
        );
        let session = attached["sessionId"].as_str().unwrap().to_owned();
        let tab = Tab {
            browser: self,
            session,
        };
        for domain in ["Page", "Runtime", "Log", "Network"] {
            tab.call(&format!("{domain}.enable"), json!({}));
        }
        tab.call(
            "Page.addScriptToEvaluateOnNewDocument",
            json!({ "source": "window.violations = []; document.addEventListener('securitypolicyviolation', \
                               (event) => violations.push(`${event.violatedDirective}: ${event.blockedURI}`));" }),
        );
        tab.size(width, 800);
        tab
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its children end with it, and it ends them best itself.
        if !thread::panicking() {
            self.send(self.calls.get() + 1, None, "Browser.close", json!({}));
            let deadline = Instant::now() + Duration::from_secs(10);
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tab of a browser.
pub struct Tab<'b> {
    browser: &'b Browser,
    session: String,
}

impl Tab<'_> {
    pub fn call(&self, method: &str, params: Value) -> Value {
        self.browser.call(Some(&self.session), method, params)
    }

    /// Changes the size of the window, in CSS pixels.
    pub fn size(&self, width: u32, height: u32) {
        self.call(
            "Emulation.setDeviceMetricsOverride",
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 }),
        );
    }

    /// `light` or `dark`, and with or without motion.
    pub fn prefers(&self, scheme: &str) {
        self.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme },
                                 { "name": "prefers-reduced-motion", "value": "reduce" }] }),
        );
    }

    /// Opens an address and waits for the first state to be shown.
    pub fn open(&self, url: &str) {
        let answer = self.call("Page.navigate", json!({ "url": url }));
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
        self.until("document.querySelector('#app article, #app .banner, #app > p:not(.quiet)') !== null");
    }

    /// The value of an expression; a promise is awaited.
    pub fn eval(&self, expression: &str) -> Value {
        let answer = self.call(
            "Runtime.evaluate",
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true }),
        );
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer:#}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub fn until(&self, expression: &str) {
        let deadline = Instant::now() + LONG;
        while self.eval(expression) != true {
            assert!(
                Instant::now() < deadline,
                "never: {expression}\n{}",
                self.text("body")
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The text of an element as it is shown, its white space (thin spaces in numbers included) folded.
    pub fn text(&self, selector: &str) -> String {
        let text = self.eval(&format!(
            "document.querySelector({})?.innerText ?? ''",
            json!(selector)
        ));
        text.as_str()
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Waits until the text of an element contains `words`.
    pub fn shows(&self, selector: &str, words: &str) {
        let words = json!(words);
        let selector = json!(selector);
        self.until(&format!(
            "(document.querySelector({selector})?.innerText ?? '').replace(/\\s+/g, ' ').includes({words})"
        ));
    }

    /// Presses and releases a key that has no text (`Tab`, `Enter`).
    pub fn press(&self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, Value::Null),
            "Enter" => (13, json!("\r")),
            _ => panic!("{key}: not a key of these tests"),
        };
        let mut down = json!({ "type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code });
        if !text.is_null() {
            down["text"] = text;
        }
        self.call("Input.dispatchKeyEvent", down);
        self.call(
            "Input.dispatchKeyEvent",
            json!({ "type": "keyUp", "key": key, "code": key, "windowsVirtualKeyCode": code }),
        );
    }

    /// Lets so much time pass for the page as fast as it goes, its questions to the server included. After that, time stands
    /// still for it until the next call.
    pub fn fast_forward(&self, time: Duration) {
        let budget = u64::try_from(time.as_millis()).unwrap();
        self.call(
            "Emulation.setVirtualTimePolicy",
            json!({ "policy": "pauseIfNetworkFetchesPending", "budget": budget }),
        );
        let session = self.session.as_str();
        self.browser.wait("the end of virtual time", |message| {
            message["method"] == "Emulation.virtualTimeBudgetExpired" && message["sessionId"] == session
        });
    }

    /// What the browser told of this tab under one name.
    pub fn events(&self, method: &str) -> Vec<Value> {
        // Whatever happened before now has been told before the answer to this.
        self.eval("0");
        let events = self.browser.events.borrow();
        let mine = events
            .iter()
            .filter(|event| event["method"] == method && event["sessionId"] == self.session.as_str());
        mine.map(|event| event["params"].clone()).collect()
    }

    /// Nothing went wrong that nobody saw: no word in the console, no exception, no breach of the policy, and no request to
    /// anything but `origin`.
    pub fn is_clean(&self, origin: &str) {
        for method in [
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        ] {
            let events = self.events(method);
            assert!(events.is_empty(), "{method}: {events:#?}");
        }
        assert_eq!(self.eval("violations"), json!([]));
        for request in self.events("Network.requestWillBeSent") {
            let url = request["request"]["url"].as_str().unwrap();
            let allowed = url.starts_with(&format!("{origin}/")) || url.starts_with("data:image/svg+xml,");
            assert!(allowed, "{url}");
        }
    }

    /// A picture of the whole page.
    pub fn picture(&self) -> String {
        let height = self
            .eval("document.documentElement.scrollHeight")
            .as_u64()
            .unwrap();
        let width = self.eval("innerWidth").as_u64().unwrap();
        let shot = self.call(
            "Page.captureScreenshot",
            json!({ "captureBeyondViewport": true,
                    "clip": { "x": 0, "y": 0, "width": width, "height": height, "scale": 1 } }),
        );
        shot["data"].as_str().unwrap().to_owned()
    }
}
