//! What came of it: a table as it comes, figures as JSON in the end.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::contender::Who;
use crate::line::{Better, Figure, Result, Summary, Target};
use crate::options::Setting;

pub struct Report {
    machine: Value,
    results: Vec<Result>,
}

impl Report {
    pub fn begin(setting: &Setting) -> Report {
        let machine = machine(setting);
        println!(
            "{} processors ({}), Linux {}, load {}; nothing is pinned; {} turns of {} ms each; median (least..greatest)",
            machine["processors"],
            machine["processors_allowed"].as_str().unwrap_or("?"),
            machine["kernel"].as_str().unwrap_or("?"),
            machine["load"].as_str().unwrap_or("?"),
            setting.rounds,
            setting.window.as_millis(),
        );
        println!(
            "{:26} {:>13} {:>24} {:>24} {:>6} {:>14} {:>24} {:>6} {:>14}",
            "line", "figure", "ours", "plain", "ratio", "target", "vhost-device-vsock", "ratio", "target"
        );
        Report {
            machine,
            results: Vec::new(),
        }
    }

    pub fn add(&mut self, result: Result) {
        for figure in &result.figures {
            row(&result, figure, Who::Plain, figure.plain);
            for (who, target) in [
                (Who::Relay, None),
                (Who::Spread, None),
                (Who::Without, figure.without),
            ] {
                if result.summary(who, figure.key).is_some() {
                    row(&result, figure, who, target);
                }
            }
        }
        if let Some(busy) = result
            .summary(Who::Ours, "guest busy")
            .filter(|busy| busy.median > 0.9)
        {
            println!(
                "{:26} {:>13} the guest's thread was busy for {:.0} % of the time",
                result.name,
                "",
                busy.median * 100.0
            );
        }
        for (who, why) in &result.absent {
            println!("{:26} {:>13} {}: {why}", result.name, "", who.name());
        }
        self.results.push(result);
    }

    /// How many targets are met, and which are not.
    pub fn end(&self) {
        let judged: Vec<_> = self.results.iter().flat_map(judgements).collect();
        let met = judged.iter().filter(|(_, _, _, met)| *met).count();
        println!("{met} of {} targets met", judged.len());
        for (what, value, target, _) in judged.iter().filter(|(_, _, _, met)| !met) {
            println!("  not met: {what} is {value:.2}, target {target}");
        }
    }

    pub fn results(&self) -> &[Result] {
        &self.results
    }

    pub fn write(&self, file: &Path) -> io::Result<()> {
        let lines: Vec<Value> = self.results.iter().map(as_json).collect();
        if let Some(dir) = file.parent() {
            fs::create_dir_all(dir)?;
        }
        let text = serde_json::to_string_pretty(&json!({ "machine": self.machine, "lines": lines }))?;
        fs::write(file, text + "\n")
    }
}

fn row(result: &Result, figure: &Figure, against: Who, target: Option<Target>) {
    let key = figure.key;
    let aside = against != Who::Plain;
    let named = if aside {
        format!("({})", against.name())
    } else {
        format!("{key} {}", figure.unit)
    };
    let ours = result.summary(Who::Ours, key);
    let theirs = result.summary(against, key);
    let peer = if aside {
        None
    } else {
        result.summary(Who::Peer, key)
    };
    let target = target.or(figure.own.filter(|_| !aside));
    let judged = if figure.own.is_some() && !aside {
        ours.map(|ours| ours.median)
    } else {
        ratio(ours, theirs)
    };
    println!(
        "{:26} {:>13} {:>24} {:>24} {:>6} {:>14} {:>24} {:>6} {:>14}",
        result.name,
        named,
        cell(ours),
        cell(theirs),
        ratio(ours, theirs).map_or(String::new(), |ratio| format!("{ratio:.2}")),
        verdict(target, judged),
        cell(peer),
        ratio(ours, peer).map_or(String::new(), |ratio| format!("{ratio:.2}")),
        verdict(figure.peer.filter(|_| !aside), ratio(ours, peer)),
    );
}

fn cell(summary: Option<Summary>) -> String {
    match summary {
        None => "-".into(),
        Some(summary) => format!(
            "{} ({}..{})",
            number(summary.median),
            number(summary.least),
            number(summary.greatest)
        ),
    }
}

/// Three digits that count, or as many as it has before the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn ratio(ours: Option<Summary>, theirs: Option<Summary>) -> Option<f64> {
    let ratio = ours?.median / theirs?.median;
    ratio.is_finite().then_some(ratio)
}

fn verdict(target: Option<Target>, value: Option<f64>) -> String {
    match (target, value) {
        (None, _) => String::new(),
        (Some(target), None) => format!("{target} ?"),
        (Some(target), Some(value)) if target.is_met(value) => format!("{target} yes"),
        (Some(target), Some(_)) => format!("{target} NO"),
    }
}

/// Every target that has a value: what it is about, the value, the target, whether it is met.
fn judgements(result: &Result) -> Vec<(String, f64, Target, bool)> {
    let mut all = Vec::new();
    for figure in &result.figures {
        let ours = result.summary(Who::Ours, figure.key);
        let values = [
            (
                "against plain",
                figure.plain,
                ratio(ours, result.summary(Who::Plain, figure.key)),
            ),
            (
                "against vhost-device-vsock",
                figure.peer,
                ratio(ours, result.summary(Who::Peer, figure.key)),
            ),
            (
                "against itself without",
                figure.without,
                ratio(ours, result.summary(Who::Without, figure.key)),
            ),
            ("by itself", figure.own, ours.map(|ours| ours.median)),
        ];
        for (against, target, value) in values {
            if let (Some(target), Some(value)) = (target, value) {
                let what = format!("{} {} {against}", result.name, figure.key);
                all.push((what, value, target, target.is_met(value)));
            }
        }
    }
    all
}

fn as_json(result: &Result) -> Value {
    let mut contenders = Map::new();
    for who in Who::ALL {
        if let Some(why) = result.absent.get(&who) {
            contenders.insert(who.name().into(), json!({ "absent": why }));
        } else if let Some(samples) = result.samples.get(&who) {
            let figures: Map<String, Value> = samples
                .iter()
                .filter_map(|(key, values)| {
                    let summary = Summary::of(values)?;
                    let value = json!({
                        "median": summary.median, "least": summary.least, "greatest": summary.greatest, "samples": values,
                    });
                    Some(((*key).to_owned(), value))
                })
                .collect();
            contenders.insert(who.name().into(), figures.into());
        }
    }
    let figures: Vec<Value> = result
        .figures
        .iter()
        .map(|figure| {
            json!({
                "figure": figure.key, "unit": figure.unit,
                "better": if figure.better == Better::More { "more" } else { "less" },
            })
        })
        .collect();
    let targets: Vec<Value> = judgements(result)
        .into_iter()
        .map(|(what, value, target, met)| json!({ "what": what, "value": value, "target": target.to_string(), "met": met }))
        .collect();
    json!({
        "name": result.name, "what": result.what, "figures": figures, "contenders": contenders, "targets": targets,
    })
}

fn machine(setting: &Setting) -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo").lines().find_map(|line| {
        line.strip_prefix("model name")?
            .split_once(':')
            .map(|(_, name)| name.trim().to_owned())
    });
    let status = read("/proc/self/status");
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .map(str::trim);
    json!({
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "model": model,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").split(' ').next(),
        "version": env!("CARGO_PKG_VERSION"),
        "processors_allowed": allowed,
        "turns": setting.rounds,
        "window_ms": setting.window.as_millis() as u64,
        "quick": setting.quick,
    })
}
