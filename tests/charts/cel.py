"""Does to pods what an API server does with a MutatingAdmissionPolicy and a ValidatingAdmissionPolicy.

Reads {"mutating": policy, "validating": policy, "pods": {name: pod}} as JSON and writes, for each name, {"matched": whether the mutating
policy's conditions hold, "pod": the pod after it, "denied": the first message of the validating policy or null}.

Or, for a KubeVirt Plugin: reads {"expressions": [{"expression": text, "context": {name: value}}]} and writes the list of their values.

The evaluator knows CEL and not Kubernetes' types: `Object.spec.initContainers{name: …}`, `JSONPatch{…}` and KubeVirt's `Domain{…}` are made literal maps first.
That the types of policies name the path of the field they are in, which the API server asks for, is checked on the way.
"""

import copy
import json
import re
import sys

import celpy
from celpy import celtypes

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*|&&|\|\||[<>=!]=|[0-9.]+|\s+|.', re.S)
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")


def without_types(expression):
    tokens = [token for token in TOKEN.findall(expression) if not token.isspace()]
    out, open_braces = [], []
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ""
        after = tokens[index + 1] if index + 1 < len(tokens) else ""
        if after == "{" and token[0].isupper():
            check_path(token, open_braces)
            open_braces.append([token, None, 0])
            continue
        if token == "{" and before[:1].isupper():
            out.append("{")
            continue
        if token == "{":
            open_braces.append(["map", None, 0])
        elif token in "([" and open_braces:
            open_braces[-1][2] += 1
        elif token in ")]" and open_braces:
            open_braces[-1][2] -= 1
        elif token == "}":
            open_braces.pop()
        elif open_braces and open_braces[-1][0] != "map" and open_braces[-1][2] == 0:
            if after == ":" and before in ("{", ",") and IDENTIFIER.match(token):
                open_braces[-1][1] = token
                token = json.dumps(token)
        out.append(token)
    return " ".join(out)


def check_path(type_name, open_braces):
    if not type_name.startswith("Object.") or not open_braces or open_braces[-1][0] in ("map", "JSONPatch"):
        return
    outer, field, _ = open_braces[-1]
    if type_name != f"{outer}.{field}":
        raise ValueError(f"{type_name} stands in field {field} of {outer}")


def index_of(values, value):
    return celtypes.IntType(values.index(value) if value in values else -1)


class Policy:
    def __init__(self, policy):
        self.environment = celpy.Environment()
        self.spec = policy["spec"]
        self.programs = {}

    def evaluate(self, expression, context):
        if expression not in self.programs:
            tree = self.environment.compile(without_types(expression))
            self.programs[expression] = self.environment.program(tree, functions={"indexOf": index_of})
        return self.programs[expression].evaluate(context)

    def context(self, pod):
        context = {"object": celpy.json_to_cel(pod)}
        return context

    def with_variables(self, pod):
        context = self.context(pod)
        variables = celtypes.MapType()
        for variable in self.spec.get("variables", []):
            context["variables"] = variables
            variables[celtypes.StringType(variable["name"])] = self.evaluate(variable["expression"], context)
        context["variables"] = variables
        return context


def selected(policy, pod):
    wanted = policy.spec["matchConstraints"]["objectSelector"]["matchLabels"]
    labels = pod["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def plain(value):
    """What json knows: CEL's truth values are numbers in disguise."""
    if isinstance(value, celtypes.BoolType):
        return bool(value)
    if isinstance(value, celtypes.IntType):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(element) for key, element in value.items()}
    if isinstance(value, list):
        return [plain(element) for element in value]
    raise ValueError(f"{value!r} is no value of a manifest")


def add(document, path, value):
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in way:
        document = document[int(part) if isinstance(document, list) else part]
    if isinstance(document, list):
        if last != "-" and int(last) > len(document):
            raise ValueError(f"{path}: the list has {len(document)} elements")
        document.insert(len(document) if last == "-" else int(last), value)
    else:
        document[last] = value


def mutate(policy, pod):
    if not selected(policy, pod):
        return False, pod
    conditions = policy.spec.get("matchConditions", [])
    # The API server ends at the first that is false; an error of one would refuse the pod, so none may be hidden by another's false.
    if not all([bool(policy.evaluate(condition["expression"], policy.context(pod))) for condition in conditions]):
        return False, pod
    patched = copy.deepcopy(pod)
    for mutation in policy.spec["mutations"]:
        operations = policy.evaluate(mutation["jsonPatch"]["expression"], policy.with_variables(pod))
        for operation in plain(operations):
            assert operation["op"] == "add", operation
            add(patched, operation["path"], operation["value"])
    return True, patched


def denied(policy, pod):
    if not selected(policy, pod):
        return None
    for validation in policy.spec["validations"]:
        try:
            if not policy.evaluate(validation["expression"], policy.with_variables(pod)):
                return validation["message"]
        except celpy.CELEvalError as error:
            return f"error: {error} in {validation['expression']}"
    return None


def main():
    task = json.load(sys.stdin)
    if "expressions" in task:
        policy = Policy({"spec": {}})
        contexts = [{key: celpy.json_to_cel(value) for key, value in one["context"].items()} for one in task["expressions"]]
        values = [plain(policy.evaluate(one["expression"], context)) for one, context in zip(task["expressions"], contexts)]
        json.dump(values, sys.stdout)
        return
    mutating, validating = Policy(task["mutating"]), Policy(task["validating"])
    answers = {}
    for name, pod in task["pods"].items():
        matched, patched = mutate(mutating, pod)
        answers[name] = {"matched": matched, "pod": patched, "denied": denied(validating, patched)}
    json.dump(answers, sys.stdout)


main()
