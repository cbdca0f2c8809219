//! Reading the schema types from a [`Document`] without stopping at the first mistake.
//!
//! Every value of the schema is a [`Given`]. A derived `Deserialize` asks for each of them in turn; when one cannot
//! be read, the mistake is reported with its place and the value becomes [`Given::Wrong`], so that the rest of the
//! file is still read. Unknown and repeated keys are reported and skipped in the same way.
//!
//! How a `Given` speaks to [`Reader`], the only deserializer that knows it: it asks for an option, and is answered
//! with a sequence of two, its node's number and the value; no second element means that the value was wrong and is
//! reported. (`deserialize_option` is also what serde asks a missing field for, which gives [`Given::Absent`].)

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::{Deserialize, Serialize, Serializer};

use super::diagnostic::{Report, did_you_mean, quoted};
use super::document::{Document, Entry, NodeId, Value};

/// What the user gave for a key.
#[derive(Clone, PartialEq, Debug)]
pub enum Given<T> {
    /// Nothing, and there is no default.
    Absent,
    /// Something that cannot be read, which is already reported.
    Wrong,
    /// A value and its place; no place for a default.
    Right(T, Option<NodeId>),
}

impl<T> Given<T> {
    /// A value that is not from a file.
    pub fn new(value: T) -> Given<T> {
        Given::Right(value, None)
    }

    /// The value, if there is a readable one.
    pub fn value(&self) -> Option<&T> {
        match self {
            Given::Right(value, _) => Some(value),
            Given::Absent | Given::Wrong => None,
        }
    }

    /// The value and where it stands, if the user gave a readable one.
    pub fn located(&self) -> Option<(&T, NodeId)> {
        match self {
            Given::Right(value, Some(at)) => Some((value, *at)),
            _ => None,
        }
    }

    /// Whether the key is not there.
    pub fn is_absent(&self) -> bool {
        matches!(self, Given::Absent)
    }
}

impl<T: Default> Given<T> {
    /// The default of a key that the user leaves out.
    pub fn default_value() -> Given<T> {
        Given::new(T::default())
    }
}

/// What a key without a default is when the user leaves it out.
impl<T> Default for Given<T> {
    fn default() -> Given<T> {
        Given::Absent
    }
}

impl<T: Serialize> Serialize for Given<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value() {
            Some(value) => value.serialize(serializer),
            None => serializer.serialize_none(),
        }
    }
}

/// In the JSON Schema a `Given<T>` is a `T`.
impl<T: JsonSchema> JsonSchema for Given<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Given<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Given<T>, D::Error> {
        struct GivenVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for GivenVisitor<T> {
            type Value = Given<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_none<E>(self) -> Result<Given<T>, E> {
                Ok(Given::Absent)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Given<T>, A::Error> {
                let at = seq.next_element::<usize>()?.map(NodeId::from_number);
                Ok(match seq.next_element::<T>()? {
                    Some(value) => Given::Right(value, at),
                    None => Given::Wrong,
                })
            }
        }

        deserializer.deserialize_option(GivenVisitor(PhantomData))
    }
}

/// Reads a `T` from the whole document. Mistakes are in the report afterwards.
pub(super) fn read<T: DeserializeOwned>(document: &Document, report: &mut Report<'_>) -> Given<T> {
    let reader = Reader {
        document,
        at: Document::ROOT,
        report: &RefCell::new(report),
    };
    // A `Given` swallows every mistake of its value; see `GivenAccess`.
    Given::deserialize(reader).unwrap_or(Given::Wrong)
}

/// A value that a type refuses: what is wrong, and what would be right. Its text form is how the two travel through
/// [`serde::de::Error::custom`].
pub(super) struct Refusal {
    pub(super) message: String,
    pub(super) help: String,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Refusal {
        Refusal {
            message: message.into(),
            help: help.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.message, self.help)
    }
}

/// Why a node could not be read.
#[derive(Debug)]
struct Mistake {
    message: String,
    help: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Mistake {}

impl serde::de::Error for Mistake {
    fn custom<T: fmt::Display>(text: T) -> Mistake {
        let text = text.to_string();
        match text.split_once('\n') {
            Some((message, help)) => Mistake {
                message: message.to_owned(),
                help: help.to_owned(),
            },
            None => Mistake {
                message: text,
                help: String::new(),
            },
        }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Mistake {
        Mistake {
            message: format!("{found} is not what belongs here"),
            help: format!("give {expected}"),
        }
    }
}

#[derive(Clone, Copy)]
struct Reader<'d, 'r, 't> {
    document: &'d Document,
    at: NodeId,
    report: &'r RefCell<&'r mut Report<'t>>,
}

impl<'d> Reader<'d, '_, '_> {
    fn at(self, at: NodeId) -> Self {
        Reader { at, ..self }
    }

    fn value(&self) -> &'d Value {
        self.document.value(self.at)
    }

    fn wrong(&self, expected: &dyn Expected) -> Mistake {
        let help = match self.value() {
            Value::Null => format!("give {expected}, or remove the key"),
            _ => format!("give {expected}"),
        };
        Mistake {
            message: describe(self.value()),
            help,
        }
    }
}

/// A node as the start of a sentence, for a value of the wrong kind.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing is given".to_owned(),
        Value::Bool(value) => format!("{value} is of the wrong type (a boolean)"),
        Value::Integer(value) => format!("{value} is of the wrong type (a number)"),
        Value::Float(value) => format!("{value} is of the wrong type (a floating-point number)"),
        Value::Text(value) => format!("{} is of the wrong type (text)", quoted(value)),
        Value::List(_) => "a list is of the wrong type here".to_owned(),
        Value::Map(_) => "a mapping is of the wrong type here".to_owned(),
    }
}

impl<'de> Deserializer<'de> for Reader<'_, '_, '_> {
    type Error = Mistake;

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        visitor.visit_seq(GivenAccess {
            reader: self,
            step: 0,
        })
    }

    /// Scalars of the schema that are written as text come here; see `values::deserialize_text`.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.value() {
            Value::Text(text) => visitor.visit_str(text),
            Value::Integer(number) => match u64::try_from(*number) {
                Ok(number) => visitor.visit_u64(number),
                Err(_) => Err(Mistake {
                    message: format!("{number} is out of range"),
                    help: format!("give {}", &visitor as &dyn Expected),
                }),
            },
            Value::Bool(_) | Value::Float(_) => {
                let mut mistake = self.wrong(&visitor);
                mistake
                    .help
                    .push_str("; YAML reads it as text when it stands in quotes");
                Err(mistake)
            }
            _ => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.value() {
            Value::Integer(_) => self.deserialize_any(visitor),
            Value::Text(text)
                if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'_') =>
            {
                let mut mistake = self.wrong(&visitor);
                mistake.help.push_str(", without quotes, leading zeros or `_`");
                Err(mistake)
            }
            _ => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.value() {
            Value::Bool(value) => visitor.visit_bool(*value),
            _ => Err(self.wrong(&"`true` or `false`, without quotes")),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.value() {
            Value::List(items) => visitor.visit_seq(ListAccess {
                reader: self,
                items: items.iter(),
            }),
            Value::Null => Err(Mistake {
                message: "nothing is given".to_owned(),
                help: "give a list (`[]` is an empty one), or remove the key".to_owned(),
            }),
            value => Err(Mistake {
                message: describe(value),
                help: "give a list: each item on a line that begins with `- `, or between `[` and `]`"
                    .to_owned(),
            }),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        let keys = || {
            fields
                .iter()
                .map(|key| format!("`{key}`"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        match self.value() {
            Value::Map(entries) => {
                let is_present =
                    |field: &&str| entries.iter().any(|entry| entry.key.as_deref() == Some(*field));
                let present = fields.iter().copied().filter(is_present).collect();
                visitor.visit_map(StructAccess {
                    reader: self,
                    entries,
                    fields,
                    present,
                    read: Vec::new(),
                    next: 0,
                    value: None,
                })
            }
            Value::Null => Err(Mistake {
                message: "nothing is given".to_owned(),
                help: format!("give a mapping with the keys {}, or remove the key", keys()),
            }),
            value => Err(Mistake {
                message: describe(value),
                help: format!("give a mapping with the keys {}", keys()),
            }),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        let choice = || {
            variants
                .iter()
                .map(|word| format!("`{word}`"))
                .collect::<Vec<_>>()
                .join(" or ")
        };
        // Helm and other writers of YAML 1.1 take `off` for a boolean and write `false`.
        let word = match self.value() {
            Value::Text(word) => Some(word.as_str()),
            Value::Bool(false) => Some("off"),
            Value::Bool(true) => Some("on"),
            _ => None,
        };
        if let Some(word) = word.filter(|word| variants.contains(word)) {
            return visitor.visit_enum(IntoDeserializer::<Mistake>::into_deserializer(word));
        }
        match self.value() {
            Value::Text(word) => Err(Mistake {
                message: format!("{} is not known here", quoted(word)),
                help: match did_you_mean(word, variants) {
                    Some(meant) => format!("did you mean `{meant}`? (it is {})", choice()),
                    None => format!("give {}", choice()),
                },
            }),
            value => Err(Mistake {
                message: describe(value),
                help: format!("give {}", choice()),
            }),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        tuple tuple_struct map identifier ignored_any
    }
}

/// The two elements that a [`Given`] reads.
struct GivenAccess<'d, 'r, 't> {
    reader: Reader<'d, 'r, 't>,
    step: u8,
}

impl<'de> SeqAccess<'de> for GivenAccess<'_, '_, '_> {
    type Error = Mistake;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Mistake> {
        self.step += 1;
        if self.step == 1 {
            return seed
                .deserialize(self.reader.at.number().into_deserializer())
                .map(Some);
        }
        match seed.deserialize(self.reader) {
            Ok(value) => Ok(Some(value)),
            Err(mistake) => {
                let Reader { document, at, report } = self.reader;
                report
                    .borrow_mut()
                    .error(document, at, mistake.message, mistake.help);
                Ok(None)
            }
        }
    }
}

struct ListAccess<'d, 'r, 't> {
    reader: Reader<'d, 'r, 't>,
    items: std::slice::Iter<'d, NodeId>,
}

impl<'de> SeqAccess<'de> for ListAccess<'_, '_, '_> {
    type Error = Mistake;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Mistake> {
        self.items
            .next()
            .map(|item| seed.deserialize(self.reader.at(*item)))
            .transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

/// The entries of a mapping whose keys the schema knows; the others are reported here.
struct StructAccess<'d, 'r, 't> {
    reader: Reader<'d, 'r, 't>,
    entries: &'d [Entry],
    fields: &'static [&'static str],
    /// The fields that have a key of their name.
    present: Vec<&'static str>,
    /// The fields that were handed out so far, and on which line their keys stand.
    read: Vec<(&'static str, u32)>,
    next: usize,
    value: Option<NodeId>,
}

impl StructAccess<'_, '_, '_> {
    /// The key under which the entry at `index` is read, if any. Reports what is wrong with its key.
    fn known(&self, index: usize) -> Option<&'static str> {
        let Reader { document, at, report } = self.reader;
        let entry = self.entries.get(index)?;
        let Some(key) = &entry.key else {
            let help = format!("keys here are {}", self.choice());
            report.borrow_mut().error_at(
                entry.key_at,
                document.path(entry.value),
                "this key is no text",
                help,
            );
            return None;
        };
        let Some(field) = self.fields.iter().find(|field| *field == key) else {
            let meant = did_you_mean(key, self.fields);
            let help = match meant {
                Some(meant) => format!("did you mean `{meant}`? (keys here: {})", self.choice()),
                None => format!("keys here are {}", self.choice()),
            };
            let message = format!("unknown key {}", quoted(key));
            report
                .borrow_mut()
                .error_at(entry.key_at, document.path(entry.value), message, help);
            // A mistyped key is read as the one that was meant, once: then the mistakes below it are found too, and
            // the key that was meant is not called missing.
            return meant.filter(|meant| !self.present.contains(meant) && self.line_read(meant).is_none());
        };
        if let Some(line) = self.line_read(field) {
            let message = format!("`{key}` is given a second time, after line {line}");
            let path = document.path_of_key(at, key);
            report
                .borrow_mut()
                .error_at(entry.key_at, path, message, "keep one of the two");
            return None;
        }
        Some(field)
    }

    fn line_read(&self, field: &str) -> Option<u32> {
        self.read
            .iter()
            .find(|(read, _)| *read == field)
            .map(|(_, line)| *line)
    }

    fn choice(&self) -> String {
        self.fields
            .iter()
            .map(|field| format!("`{field}`"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl<'de> MapAccess<'de> for StructAccess<'_, '_, '_> {
    type Error = Mistake;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Mistake> {
        while let Some(entry) = self.entries.get(self.next) {
            let field = self.known(self.next);
            self.next += 1;
            if let Some(field) = field {
                self.read.push((field, entry.key_at.line));
                self.value = Some(entry.value);
                let key: StrDeserializer<'_, Mistake> = field.into_deserializer();
                return seed.deserialize(key).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Mistake> {
        match self.value.take() {
            Some(value) => seed.deserialize(self.reader.at(value)),
            None => Err(serde::de::Error::custom("a value was asked for before its key")),
        }
    }
}
