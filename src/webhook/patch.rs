//! A JSON patch that is applied while it is written.

use serde_json::{Value, json};

/// A document, and the operations that made it of the one it was (JSON Patch, RFC 6902). Only `add` is needed.
#[derive(Clone, PartialEq, Debug)]
pub struct Patched {
    document: Value,
    operations: Vec<Value>,
}

/// A step on the way into a document.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step<'a> {
    /// Of an object.
    Key(&'a str),
    /// Of an array.
    Index(usize),
}

/// An operation that does not fit the document; the caller has checked what it is about to change.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path} cannot be added to: there is no object or list of that kind")]
pub struct DoesNotFit {
    /// JSON pointer.
    pub path: String,
}

impl Patched {
    /// A document without operations.
    pub fn new(document: Value) -> Patched {
        Patched {
            document,
            operations: Vec::new(),
        }
    }

    /// Sets `key` of the object at `way`, which there has to be.
    ///
    /// # Errors
    /// If there is no object.
    pub fn set(&mut self, way: &[Step<'_>], key: &str, value: Value) -> Result<(), DoesNotFit> {
        let path = format!("{}/{}", pointer(way), escaped(key));
        match find(&mut self.document, way).and_then(Value::as_object_mut) {
            Some(object) => object.insert(key.to_owned(), value.clone()),
            None => return Err(DoesNotFit { path }),
        };
        self.record(path, value);
        Ok(())
    }

    /// Puts `value` before the element `index` of the list `key` of the object at `way`; `None` puts it at the end. Makes the
    /// list if it is missing or null, which in the API means the same.
    ///
    /// # Errors
    /// If there is no object, or something else than a list in it, or an index beyond the end.
    pub fn insert(
        &mut self,
        way: &[Step<'_>],
        key: &str,
        index: Option<usize>,
        value: Value,
    ) -> Result<(), DoesNotFit> {
        let list_path = format!("{}/{}", pointer(way), escaped(key));
        let misfit = || DoesNotFit {
            path: list_path.clone(),
        };
        let object = find(&mut self.document, way)
            .and_then(Value::as_object_mut)
            .ok_or_else(misfit)?;
        match object.get_mut(key) {
            None | Some(Value::Null) => {
                let list = json!([value]);
                object.insert(key.to_owned(), list.clone());
                self.record(list_path, list);
            }
            Some(Value::Array(list)) => {
                let at = index.unwrap_or(list.len());
                if at > list.len() {
                    return Err(misfit());
                }
                list.insert(at, value.clone());
                let last = index.map_or_else(|| "-".to_owned(), |index| index.to_string());
                self.record(format!("{list_path}/{last}"), value);
            }
            Some(_) => return Err(misfit()),
        }
        Ok(())
    }

    /// The document as it is now.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// What was done to it, as a JSON patch.
    pub fn operations(&self) -> &[Value] {
        &self.operations
    }

    fn record(&mut self, path: String, value: Value) {
        self.operations
            .push(json!({"op": "add", "path": path, "value": value}));
    }
}

fn find<'a>(document: &'a mut Value, way: &[Step<'_>]) -> Option<&'a mut Value> {
    way.iter().try_fold(document, |value, step| match step {
        Step::Key(key) => value.get_mut(*key),
        Step::Index(index) => value.get_mut(*index),
    })
}

fn pointer(way: &[Step<'_>]) -> String {
    way.iter()
        .map(|step| match step {
            Step::Key(key) => format!("/{}", escaped(key)),
            Step::Index(index) => format!("/{index}"),
        })
        .collect()
}

/// A key as a token of a JSON pointer (RFC 6901, section 3).
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use super::Step::{Index, Key};
    use super::*;

    #[test]
    fn what_is_recorded_makes_the_same_document_elsewhere() {
        let before = json!({"a": {"x/y": {"~": 1}}, "l": [{"m": null}], "n": [1, 2]});
        let mut patched = Patched::new(before.clone());
        patched.set(&[Key("a"), Key("x/y")], "k/~", json!(2)).unwrap();
        patched
            .insert(&[Key("l"), Index(0)], "m", Some(0), json!("first"))
            .unwrap();
        patched
            .insert(&[Key("l"), Index(0)], "m", None, json!("last"))
            .unwrap();
        patched.insert(&[], "n", Some(0), json!(0)).unwrap();
        patched.insert(&[], "new", None, json!({})).unwrap();
        let mut elsewhere = before;
        let patch: json_patch::Patch = serde_json::from_value(json!(patched.operations())).unwrap();
        json_patch::patch(&mut elsewhere, &patch).unwrap();
        assert_eq!(&elsewhere, patched.document());
        assert_eq!(
            elsewhere,
            json!({"a": {"x/y": {"~": 1, "k/~": 2}}, "l": [{"m": ["first", "last"]}], "n": [0, 1, 2], "new": [{}]})
        );
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let before = json!({"a": 1, "l": [1]});
        let mut patched = Patched::new(before.clone());
        assert_eq!(patched.set(&[Key("a")], "k", json!(1)).unwrap_err().path, "/a/k");
        assert!(patched.set(&[Key("b")], "k", json!(1)).is_err());
        assert!(patched.insert(&[], "a", None, json!(1)).is_err());
        assert!(patched.insert(&[], "l", Some(2), json!(1)).is_err());
        assert!(
            patched
                .insert(&[Key("l"), Index(7)], "l", None, json!(1))
                .is_err()
        );
        assert_eq!((patched.document(), patched.operations()), (&before, &[][..]));
    }
}
