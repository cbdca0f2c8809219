//! A YAML document as a tree of nodes that know their place and path.
//!
//! Reading the text into a tree of our own first, and the tree into the schema after, is what lets one run name
//! every unknown key and every wrong type: a deserializer straight over the text stops at the first.
//!
//! Everything here is bounded before it is built (see [`options`]): the tree cannot have more nodes than the budget
//! allows, aliases included, however small the text that asks for them.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{
    DuplicateKeyPolicy, Error, Location, MessageFormatter, NonFiniteFloatPolicy, Spanned,
    UserMessageFormatter,
};

use super::diagnostic::Report;

/// Nesting that the file may have; the schema needs six levels.
const MAX_DEPTH: usize = 32;

/// Scalars, lists and mappings that the file may have, aliases expanded.
const MAX_NODES: usize = 100_000;

/// A node of a [`Document`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeId(usize);

impl NodeId {
    pub(super) fn from_number(number: usize) -> NodeId {
        NodeId(number)
    }

    pub(super) fn number(self) -> usize {
        self.0
    }
}

/// A part of the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    /// Counted from 1.
    pub(super) line: u32,
    /// Counted from 1, in characters.
    pub(super) column: u32,
    /// In bytes; `None` when the parser does not know.
    pub(super) offset: Option<usize>,
    /// In bytes.
    pub(super) length: usize,
}

/// What stands at a node.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<NodeId>),
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug)]
pub(super) struct Entry {
    /// The key; `None` when it is no text.
    pub(super) key: Option<String>,
    pub(super) key_at: Span,
    pub(super) value: NodeId,
}

#[derive(Debug)]
struct Node {
    value: Value,
    at: Span,
    parent: Option<(NodeId, Step)>,
}

#[derive(Debug)]
enum Step {
    Key(String),
    Index(usize),
}

/// A parsed file.
#[derive(Debug)]
pub(super) struct Document {
    nodes: Vec<Node>,
}

impl Document {
    /// The node of the whole document.
    pub(super) const ROOT: NodeId = NodeId(0);

    /// Parses `text`; `None` when it is no single YAML document within bounds, which is then in the report.
    pub(super) fn parse(text: &str, report: &mut Report<'_>) -> Option<Document> {
        match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options()) {
            Ok(raw) => {
                let mut document = Document { nodes: Vec::new() };
                document.add(raw, None);
                Some(document)
            }
            Err(error) => {
                let at = error.location().map_or(Span::START, |at| Span::new(at, text));
                let (message, help) = explain(&error);
                report.error_at(at, String::new(), message, help);
                None
            }
        }
    }

    pub(super) fn value(&self, id: NodeId) -> &Value {
        // Ids are only made by `add`, and nodes are never removed.
        &self.nodes[id.0].value
    }

    pub(super) fn span(&self, id: NodeId) -> Span {
        self.nodes[id.0].at
    }

    pub(super) fn line(&self, id: NodeId) -> u32 {
        self.span(id).line
    }

    /// The YAML path, such as `guests[0].outbound[2].port`.
    pub(super) fn path(&self, id: NodeId) -> String {
        let mut steps = Vec::new();
        let mut node = &self.nodes[id.0];
        while let Some((parent, step)) = &node.parent {
            steps.push(step);
            node = &self.nodes[parent.0];
        }
        let mut path = String::new();
        for step in steps.iter().rev() {
            match step {
                Step::Key(key) => path = join(&path, key),
                Step::Index(index) => path.push_str(&format!("[{index}]")),
            }
        }
        path
    }

    /// The path of a key of the mapping `id`, whether it is there or not.
    pub(super) fn path_of_key(&self, id: NodeId, key: &str) -> String {
        join(&self.path(id), key)
    }

    /// Adds a node and all below it. The depth is bounded by [`MAX_DEPTH`].
    fn add(&mut self, raw: Spanned<Raw>, parent: Option<(NodeId, Step)>) -> NodeId {
        let id = NodeId(self.nodes.len());
        let at = raw.referenced.into();
        self.nodes.push(Node {
            value: Value::Null,
            at,
            parent,
        });
        let value = match raw.value {
            Raw::Null => Value::Null,
            Raw::Bool(value) => Value::Bool(value),
            Raw::Integer(value) => Value::Integer(value),
            Raw::Float(value) => Value::Float(value),
            Raw::Text(value) => Value::Text(value),
            Raw::List(items) => Value::List(
                items
                    .into_iter()
                    .enumerate()
                    .map(|(i, item)| self.add(item, Some((id, Step::Index(i)))))
                    .collect(),
            ),
            Raw::Map(entries) => Value::Map(
                entries
                    .into_iter()
                    .map(|(key, value)| {
                        let key_at = Span::from(key.referenced);
                        let key = if let Raw::Text(key) = key.value {
                            Some(key)
                        } else {
                            None
                        };
                        let step = Step::Key(key.clone().unwrap_or_else(|| "?".to_owned()));
                        let value = self.add(value, Some((id, step)));
                        // Where nothing is given there is nothing to point at but the key.
                        if let Some(node) = self.nodes.get_mut(value.0)
                            && matches!(node.value, Value::Null)
                            && node.at.length == 0
                        {
                            node.at = key_at;
                        }
                        Entry { key, key_at, value }
                    })
                    .collect(),
            ),
        };
        self.nodes[id.0].value = value;
        id
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

impl Span {
    /// The first character of the file.
    pub(super) const START: Span = Span {
        line: 1,
        column: 1,
        offset: Some(0),
        length: 0,
    };

    /// The place of a syntax error; the parser knows the byte only sometimes.
    fn new(at: Location, text: &str) -> Span {
        let mut span = Span::from(at);
        if span.offset.is_none() {
            span.offset = offset_of(text, span.line, span.column);
        }
        span
    }
}

impl From<Location> for Span {
    fn from(at: Location) -> Span {
        let span = at.span();
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).max(1);
        Span {
            line: small(at.line()),
            column: small(at.column()),
            offset: span.byte_offset().and_then(|offset| usize::try_from(offset).ok()),
            length: span
                .byte_len()
                .and_then(|length| usize::try_from(length).ok())
                .unwrap_or(0),
        }
    }
}

fn offset_of(text: &str, line: u32, column: u32) -> Option<usize> {
    let mut start = 0;
    for _ in 1..line {
        start += text.get(start..)?.find('\n')? + 1;
    }
    let line = text.get(start..)?.split('\n').next()?;
    let column = usize::try_from(column).ok()?.checked_sub(1)?;
    Some(start + line.char_indices().nth(column).map_or(line.len(), |(at, _)| at))
}

/// A node as the parser delivers it.
enum Raw {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<Raw>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Raw, D::Error> {
        struct RawVisitor;

        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E>(self) -> Result<Raw, E> {
                Ok(Raw::Null)
            }

            fn visit_none<E>(self) -> Result<Raw, E> {
                Ok(Raw::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
                Ok(Raw::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
                Ok(Raw::Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
                Ok(Raw::Integer(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
                Ok(Raw::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
                Ok(Raw::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<Raw, E> {
                Ok(Raw::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Raw::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Raw::Map(entries))
            }
        }

        deserializer.deserialize_any(RawVisitor)
    }
}

/// How the text is read, and what bounds it.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_events: 3 * MAX_NODES,
            max_nodes: MAX_NODES,
            max_documents: 2,
            max_anchors: 1_000,
            max_aliases: 1_000,
            max_merge_keys: 1_000,
            max_recorded_anchor_events: 3 * MAX_NODES,
            max_recorded_anchor_bytes: 8 * 1024 * 1024,
            max_total_scalar_bytes: 8 * 1024 * 1024,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: MAX_DEPTH,
        },
        // Repeated keys come to us, so that they are reported together with the rest.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // YAML 1.1's octal numbers, digit groups and yes/no mean different things to different readers: they stay
        // text, which is then refused where a number is wanted.
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        emit_comments: false,
        with_snippet: false,
    }
}

/// A parser's error in the operator's words: what is wrong, what would be right.
fn explain(error: &Error) -> (String, String) {
    let said = |message: &str, help: &str| (message.to_owned(), help.to_owned());
    let error = match error {
        Error::AliasError { error, .. } => error.as_ref(),
        error => error.without_snippet(),
    };
    match error {
        Error::MultipleDocuments { .. } => said(
            "a second YAML document begins here",
            "keep one document in the file: remove `---` and what follows",
        ),
        Error::UnknownAnchor { .. } => said(
            "no anchor of this name stands above",
            "define it with `&name` before `*name`, or write the value out",
        ),
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            said("this alias stands inside its own anchor", "write the value out")
        }
        Error::Budget {
            breach: BudgetBreach::Depth { .. },
            ..
        } => too_deep(),
        Error::Budget {
            breach: BudgetBreach::Documents { .. },
            ..
        } => said(
            "the file holds several YAML documents",
            "keep one document in the file: remove `---` and what follows",
        ),
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => (
            format!("the file grows beyond {MAX_NODES} values, aliases included"),
            "use fewer anchors and aliases, or split the guests over several sidecars".to_owned(),
        ),
        error => {
            let message: Cow<'_, str> = UserMessageFormatter.format_message(error);
            let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
            if says(&["recursion limit", "nesting limit"]) {
                return too_deep();
            }
            let help = if says(&["tab"]) {
                "YAML is indented with spaces, never with tabs"
            } else if says(&["tag"]) {
                "remove the `!tag`: no value of this file needs one"
            } else if says(&["unclosed", "mismatched", "bracket", "flow"]) {
                "close each `[`, `{` and quote where it was opened"
            } else if says(&["mapping values"]) {
                "begin each key on its own line; text that contains `: ` stands in quotes"
            } else if says(&["merge"]) {
                "`<<` takes the alias of a mapping, such as `<<: *common`"
            } else if says(&["unexpected character"]) {
                "remove it; in text it stands in quotes"
            } else {
                "the keys of a mapping, and the `-` of a list, stand in one column; text that begins with one of \
                 `*&!%@{[#` or contains `: ` stands in quotes"
            };
            (format!("not valid YAML: {message}"), help.to_owned())
        }
    }
}

fn too_deep() -> (String, String) {
    (
        format!("lists and mappings are nested more than {MAX_DEPTH} deep"),
        "the configuration needs six levels; see `vsock-sidecar schema`".to_owned(),
    )
}
