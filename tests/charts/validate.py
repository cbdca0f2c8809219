"""Judges manifests by Kubernetes' own schemas (strict: no unknown fields) and by yamllint, many in one process.

Reads a JSON list of {"name", "version", "text"} and writes {"problems": [text], "unknown": [apiVersion/kind], "judged": number}.
"""

import functools
import json
import sys

import yaml
from kubernetes_validate import utils
from yamllint import linter
from yamllint.config import YamlLintConfig

# The definitions of a version are megabytes, and are asked for with each document.
utils.schema_contents = functools.lru_cache(maxsize=None)(utils.schema_contents)

# Lines of generated manifests are as long as they are; Helm writes lists without indentation.
LINT = YamlLintConfig("""
extends: default
rules:
  line-length: disable
  document-start: disable
  truthy: {check-keys: false}
  comments: disable
  comments-indentation: disable
  indentation: {spaces: 2, indent-sequences: whatever, check-multi-line-strings: false}
""")


def main():
    problems, unknown, judged = [], set(), 0
    for manifest in json.load(sys.stdin):
        name, version, text = manifest["name"], manifest["version"], manifest["text"]
        for found in linter.run(text, LINT):
            problems.append(f"{name}, Kubernetes {version}, line {found.line}: {found.desc} ({found.rule})")
        for document in yaml.safe_load_all(text):
            if document is None:
                continue
            what = f"{document['apiVersion']}/{document['kind']}"
            try:
                utils.validate(document, version, strict=True)
                judged += 1
            except utils.SchemaNotFoundError:
                unknown.add(what)
            except utils.ValidationError as error:
                path = ".".join(str(part) for part in error.absolute_path)
                problems.append(f"{name}, Kubernetes {version}, {what} at {path}: {error.message[:300]}")
    json.dump({"problems": problems, "unknown": sorted(unknown), "judged": judged}, sys.stdout)


main()
