//! A line: one kind of work, done by everybody in turns.

use std::collections::BTreeMap;
use std::io::Write;

use crate::contender::{Contender, Measures, Outcome, Who};
use crate::options::Setting;

/// Whether more is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Better {
    More,
    Less,
}

/// What a ratio must be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Target::AtLeast(bound) => value >= bound,
            Target::AtMost(bound) => value <= bound,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::AtLeast(bound) => write!(f, ">= {bound}"),
            Target::AtMost(bound) => write!(f, "<= {bound}"),
        }
    }
}

/// A figure of a line that stands in the table, with the targets for its ratios (ours / theirs).
#[derive(Clone, Debug)]
pub struct Figure {
    /// As the contenders call it.
    pub key: &'static str,
    pub unit: &'static str,
    pub better: Better,
    /// For the ratio to the plain client.
    pub plain: Option<Target>,
    /// For the ratio to the peer.
    pub peer: Option<Target>,
    /// For the ratio to ourselves without what the line is about.
    pub without: Option<Target>,
    /// For our own value.
    pub own: Option<Target>,
}

impl Figure {
    pub const fn new(key: &'static str, unit: &'static str, better: Better) -> Figure {
        Figure {
            key,
            unit,
            better,
            plain: None,
            peer: None,
            without: None,
            own: None,
        }
    }

    pub const fn plain(mut self, target: Target) -> Figure {
        self.plain = Some(target);
        self
    }

    pub const fn peer(mut self, target: Target) -> Figure {
        self.peer = Some(target);
        self
    }

    pub const fn without(mut self, target: Target) -> Figure {
        self.without = Some(target);
        self
    }

    pub const fn own(mut self, target: Target) -> Figure {
        self.own = Some(target);
        self
    }
}

type Start = Box<dyn Fn(&Setting) -> Outcome<Box<dyn Contender>>>;

/// One kind of work.
pub struct Line {
    pub name: String,
    pub what: String,
    /// Whether quick runs have it.
    pub quick: bool,
    /// Whether contenders live through all of it, rather than for a turn each.
    lasting: bool,
    pub figures: Vec<Figure>,
    contenders: Vec<(Who, Start)>,
}

/// What came of a line.
pub struct Result {
    pub name: String,
    pub what: String,
    pub figures: Vec<Figure>,
    /// Every figure of every contender, in the order of the turns.
    pub samples: BTreeMap<Who, BTreeMap<&'static str, Vec<f64>>>,
    /// Who did not take part, and why.
    pub absent: BTreeMap<Who, String>,
}

impl Line {
    pub fn new(name: impl Into<String>, what: impl Into<String>, figures: Vec<Figure>) -> Line {
        Line {
            name: name.into(),
            what: what.into(),
            quick: false,
            lasting: false,
            figures,
            contenders: Vec::new(),
        }
    }

    pub fn quick(mut self, quick: bool) -> Line {
        self.quick = quick;
        self
    }

    /// Contenders that are slow to start live through all turns.
    pub fn lasting(mut self) -> Line {
        self.lasting = true;
        self
    }

    pub fn contender<C: Contender + 'static>(
        mut self,
        who: Who,
        start: impl Fn(&Setting) -> Outcome<C> + 'static,
    ) -> Line {
        self.contenders.push((
            who,
            Box::new(move |setting| Ok(Box::new(start(setting)?) as Box<dyn Contender>)),
        ));
        self
    }

    /// Everybody's turns, interleaved. Who fails is out, and the reason is kept.
    ///
    /// Processes and connections are new for each turn, as far as that is quick: on which processor the kernel puts a thread that
    /// wakes another is a matter of luck that lasts, and differs by as much as a factor of four. So each turn throws the dice
    /// anew, and the spread shows it.
    pub fn measure(&self, setting: &Setting) -> Result {
        eprint!("{:28} ", self.name);
        let mut result = Result {
            name: self.name.clone(),
            what: self.what.clone(),
            figures: self.figures.clone(),
            samples: BTreeMap::new(),
            absent: BTreeMap::new(),
        };
        let mut lasting: BTreeMap<Who, Box<dyn Contender>> = BTreeMap::new();
        for _ in 0..setting.rounds {
            for (who, start) in &self.contenders {
                if result.absent.contains_key(who) {
                    continue;
                }
                let contender = lasting.remove(who).map_or_else(|| start(setting), Ok);
                let turn =
                    contender.and_then(|mut contender| Ok((contender.turn(setting.window)?, contender)));
                match turn {
                    Ok((measures, contender)) => {
                        result.keep(*who, measures);
                        if self.lasting {
                            lasting.insert(*who, contender);
                        }
                    }
                    Err(error) => drop(result.absent.insert(*who, error.to_string())),
                }
            }
            eprint!(".");
            let _ = std::io::stderr().flush();
        }
        eprintln!();
        result
    }
}

impl Result {
    fn keep(&mut self, who: Who, measures: Measures) {
        let samples = self.samples.entry(who).or_default();
        for (key, value) in measures {
            samples.entry(key).or_default().push(value);
        }
    }

    /// Median, least and greatest of a figure.
    pub fn summary(&self, who: Who, key: &str) -> Option<Summary> {
        if self.absent.contains_key(&who) {
            return None;
        }
        Summary::of(self.samples.get(&who)?.get(key)?)
    }
}

/// Of a figure's samples.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    pub median: f64,
    pub least: f64,
    pub greatest: f64,
}

impl Summary {
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() {
            0 => return None,
            len if len % 2 == 0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        Some(Summary {
            median,
            least: sorted[0],
            greatest: sorted[sorted.len() - 1],
        })
    }
}
