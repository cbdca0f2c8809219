//! QEMU's arguments, as far as they tell whether our device is among them.

use super::{CHARDEV_ID, Conflict, Device};

/// Options of QEMU with their values, of those that matter.
pub(super) struct CommandLine<'a> {
    pairs: Vec<(&'a str, Options<'a>)>,
}

impl<'a> CommandLine<'a> {
    pub(super) fn of(arguments: &'a [String]) -> Result<CommandLine<'a>, Conflict> {
        let mut pairs = Vec::new();
        let mut rest = arguments.iter();
        while let Some(name) = rest.next() {
            // QEMU takes two dashes for one.
            let Some(option) = name.strip_prefix('-') else {
                continue;
            };
            let option = option.strip_prefix('-').unwrap_or(option);
            if !matches!(option, "chardev" | "device" | "object") {
                continue;
            }
            // What is appended would be its value.
            let value = rest
                .next()
                .ok_or_else(|| Conflict::NoValue { option: name.clone() })?;
            pairs.push((option, Options::of(value)));
        }
        Ok(CommandLine { pairs })
    }

    /// Whether `device` is there; a conflict if something is there that is nearly it.
    pub(super) fn has(&self, device: &Device) -> Result<bool, Conflict> {
        let mut chardev = None;
        let mut has_device = false;
        for (option, value) in &self.pairs {
            match *option {
                "chardev" if value.get("id").as_deref() == Some(CHARDEV_ID) => {
                    chardev = Some(value.get("path").unwrap_or_else(|| value.text.to_owned()));
                }
                "device" if value.get("chardev").as_deref() == Some(CHARDEV_ID) => has_device = true,
                "device" if value.first("driver").contains("vsock") => {
                    return Err(Conflict::VsockArgument {
                        argument: value.text.to_owned(),
                    });
                }
                "object" => value.check_memory()?,
                _ => {}
            }
        }
        let half = |there: &str, missing: &str| Conflict::Half {
            there: there.to_owned(),
            missing: missing.to_owned(),
        };
        match (chardev, has_device) {
            (None, false) => Ok(false),
            (Some(found), _) if found != device.socket() => Err(Conflict::OtherSocket {
                found,
                wanted: device.socket().to_owned(),
            }),
            (Some(_), true) => Ok(true),
            (Some(_), false) => Err(half(
                &format!("the chardev {CHARDEV_ID}"),
                "a device that uses it",
            )),
            (None, true) => Err(half(
                &format!("a device that uses the chardev {CHARDEV_ID}"),
                "this chardev",
            )),
        }
    }
}

/// The value of an option: `first,key=value,…`, or the same as JSON.
struct Options<'a> {
    text: &'a str,
    json: Option<serde_json::Value>,
}

impl<'a> Options<'a> {
    fn of(text: &'a str) -> Options<'a> {
        let json = text.starts_with('{').then(|| serde_json::from_str(text).ok());
        Options {
            text,
            json: json.flatten(),
        }
    }

    /// The value of `key`; the last counts.
    fn get(&self, key: &str) -> Option<String> {
        if let Some(json) = &self.json {
            let value = json.get(key)?;
            return Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        let parts = parts(self.text);
        let mut values = parts.iter().filter_map(|part| {
            let (found, value) = part.split_once('=')?;
            (found == key).then(|| value.to_owned())
        });
        values.next_back()
    }

    /// What stands first without a key, whose name in JSON is `key`.
    fn first(&self, key: &str) -> String {
        if self.json.is_some() {
            return self.get(key).unwrap_or_default();
        }
        let first = parts(self.text).into_iter().next().unwrap_or_default();
        match first.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')) {
            Some(value) => value.to_owned(),
            None => first,
        }
    }

    /// Memory of the guest that somebody added by hand and that is not shared. Of QEMU's memory backends only memfd is shared
    /// unless it is told otherwise (QEMU: backends/hostmem-*.c).
    fn check_memory(&self) -> Result<(), Conflict> {
        let kind = self.first("qom-type");
        if !matches!(
            kind.as_str(),
            "memory-backend-ram" | "memory-backend-file" | "memory-backend-memfd"
        ) {
            return Ok(());
        }
        let share = self.get("share");
        let is_shared = match share.as_deref() {
            Some(share) => matches!(share, "on" | "yes" | "true" | "y"),
            None => kind == "memory-backend-memfd",
        };
        if is_shared {
            return Ok(());
        }
        Err(Conflict::Memory {
            what: format!("QEMU's argument {} has memory that is private", self.text),
            remedy: "add share=on to it",
        })
    }
}

/// Splits at commas; two commas are one that belongs to a value (QEMU: util/qemu-option.c).
fn parts(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(std::mem::take(&mut part));
        } else {
            part.push(c);
        }
    }
    parts.push(part);
    parts
}
