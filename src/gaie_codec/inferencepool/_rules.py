"""Documents -> pools and findings: the CRD of `inference.networking.k8s.io/v1`, with what each GAIE release changed.

Every rule has one place here, in the order of the CRD (config/crd/bases and api/v1 of the GAIE repository). A null is as good as absent,
as the API server has it, and each later release accepts all that the one before it did. Read leniently, without a version, is what some
release accepts, and the shape that proposal-2162 wrote. With a version, what its API server refuses under strict validation is an error.
`status` is the controllers' and not looked at: the API server drops it from what is applied.
"""

from __future__ import annotations

from typing import Any, Final

from .. import UsageError
from ._documents import decode_documents
from ._fields import DNS_LABEL, DNS_SUBDOMAIN, GROUP, KIND, Fields, Report, quoted
from ._pool import RELEASES, AppProtocol, EndpointPickerRef, FailureMode, Finding, InferencePool, release_index

API_VERSION: Final = "inference.networking.k8s.io/v1"

_SEVERAL_PORTS: Final = RELEASES.index("1.1")
_APP_PROTOCOL: Final = RELEASES.index("1.4")
_OPTIONAL_PICKER: Final = RELEASES.index("1.6")

_METADATA: Final = (
    "name generateName namespace labels annotations uid resourceVersion generation creationTimestamp deletionTimestamp "
    "deletionGracePeriodSeconds ownerReferences finalizers managedFields selfLink"
).split()
_PROTOCOLS: Final[tuple[AppProtocol, ...]] = ("http", "kubernetes.io/h2c")
_FAILURE_MODES: Final[tuple[FailureMode, ...]] = ("FailOpen", "FailClose")

# What v1alpha2, and v1 before its release, called things.
_HINTS: Final = {
    "spec.targetPortNumber": "v1 has spec.targetPorts[].number",
    "spec.extensionRef": "v1 has spec.endpointPickerRef",
    "spec.endpointPickerRef.portNumber": "v1 has spec.endpointPickerRef.port.number",
    "spec.endpointPickerRef.port.appProtocol": "the application protocol is the model servers', not the endpoint picker's",
    "spec.selector.matchExpressions": "v1 selects by matchLabels alone",
}


def decode_pools(text: str | bytes, *, gaie_version: str | None = None) -> tuple[tuple[InferencePool, ...], tuple[Finding, ...]]:
    """The pools without errors in a text of YAML or JSON (bytes are UTF-8), and all that is to say about it.

    Without `gaie_version` the newest rules hold, and notes say which releases want something else. Lists of objects are looked into, other
    kinds are named in a note. Raises MalformedRequestError for what is neither YAML nor JSON, UsageError for a version without rules.
    """
    if not isinstance(text, str | bytes):
        raise UsageError(f"the text of a manifest is str or bytes, not {type(text).__name__}")
    version = release_index(gaie_version)
    pools: list[InferencePool] = []
    findings: list[Finding] = []
    several = decode_documents(text)
    objects = [item for number, document in enumerate(several, 1) for item in _objects(document, f"document {number}")]
    is_there = False
    for label, item in objects:
        if not isinstance(item, dict):
            findings.append(Finding(pool=label, path="", severity="error", message=f"{quoted(item)} is no Kubernetes object"))
        elif item.get("kind") == "InferencePool":
            is_there = True
            report = Report(_label(item) or label, version)
            pool = _pool(report, item)
            findings += report.findings
            pools += [pool] if pool is not None and report.is_valid else []
        elif not isinstance(item.get("kind"), str) or not item["kind"]:
            findings.append(Finding(pool=_label(item) or label, path="kind", severity="error", message="required, and a string"))
        else:
            name = " ".join(filter(None, (quoted(item["kind"])[1:-1], _label(item) or label)))
            findings.append(Finding(pool=name, path="kind", severity="note", message="skipped: not an InferencePool"))
    if not is_there:
        findings.append(Finding(pool="", path="", severity="error", message=f"no InferencePool among {len(objects)} objects"))
    return tuple(pools), tuple(findings)


def _objects(document: Any, label: str) -> list[tuple[str, Any]]:
    """A document, or what it lists: `kubectl get -o yaml` of several makes one List."""
    if isinstance(document, dict) and document.get("kind") in ("List", "InferencePoolList") and isinstance(document.get("items"), list):
        return [(f"{label} item {number}", item) for number, item in enumerate(document["items"], 1)]
    return [(label, document)]


def _label(item: dict[str, Any]) -> str:
    metadata = item.get("metadata")
    if not isinstance(metadata, dict):
        return ""
    parts = [metadata.get(key) for key in ("namespace", "name")]
    if not parts[1] and metadata.get("generateName"):
        parts[1] = f"{metadata['generateName']}*"
    return "/".join(quoted(part)[1:-1] for part in parts if isinstance(part, str) and part) if isinstance(parts[1], str) else ""


def _pool(report: Report, item: dict[str, Any]) -> InferencePool | None:
    top = Fields(report, "", item, ("apiVersion", "kind", "metadata", "spec", "status"))
    version = top.text("apiVersion", required=True)
    if version is not None and version != API_VERSION:
        if version.startswith("inference.networking.x-k8s.io/"):
            report.error(
                "apiVersion",
                f"{quoted(version)} is older than {API_VERSION}; there spec.selector is under matchLabels, spec.targetPortNumber is "
                "spec.targetPorts[].number, and spec.extensionRef is spec.endpointPickerRef",
            )
        else:
            report.error("apiVersion", f"{quoted(version)} is not {API_VERSION}")
        return None  # its fields are another schema's
    metadata = Fields(report, "metadata", top.value("metadata") if "metadata" in top.found else {}, _METADATA)
    name, namespace = _names(metadata)
    spec = top.fields("spec", ("selector", "targetPorts", "appProtocol", "endpointPickerRef"), required=True, hints=_HINTS)
    if spec is None:
        return None
    selector = _selector(spec)
    ports, declared = _ports(spec)
    protocol, declared_at = _protocol(spec, declared)
    picker = _picker(spec)
    return InferencePool(
        name=name,
        namespace=namespace,
        selector=selector,
        target_ports=ports,
        app_protocol=protocol,
        declared_at=declared_at,
        picker=picker,
        accepted_since=report.accepted_since,
    )


def _names(metadata: Fields) -> tuple[str, str]:
    prefix = metadata.text("generateName")
    name = metadata.text("name", required=prefix is None, pattern=DNS_SUBDOMAIN, high=253)
    namespace = metadata.text("namespace", pattern=DNS_LABEL, high=63)
    metadata.labels("labels", key_high=317)
    metadata.labels("annotations", key_high=317, any_value=True)
    return name or "", namespace or ""


def _selector(spec: Fields) -> dict[str, str]:
    selector = spec.fields("selector", ("matchLabels",), required=True, hints=_HINTS)
    if selector is None:
        return {}
    labels = selector.labels("matchLabels", required=True)
    if labels is None:
        return {}
    count = len(selector.found["matchLabels"])
    if not 1 <= count <= 64:
        spec.report.error(selector.at("matchLabels"), f"{count} labels, not 1 to 64")
    return labels


def _ports(spec: Fields) -> tuple[tuple[int, ...], list[tuple[str, AppProtocol | None]]]:
    """Port numbers, and for each port the path of its appProtocol with what it says."""
    report = spec.report
    listed = spec.items("targetPorts", required=True)
    if listed is None:
        return (), []
    path = spec.at("targetPorts")
    if not 1 <= len(listed) <= 8:
        report.error(path, f"{len(listed)} ports, not 1 to 8")
    elif len(listed) > 1:
        report.since(_SEVERAL_PORTS, path, f"{len(listed)} ports: GAIE 1.0 takes one")
    numbers: dict[int, None] = {}
    declared: list[tuple[str, AppProtocol | None]] = []
    for place, item in enumerate(listed):
        port = Fields(report, f"{path}[{place}]", item, ("number", "appProtocol"))
        number = port.integer("number", 1, 65535, required=True)
        if number is not None:
            if number in numbers:
                report.error(port.at("number"), f"port {number} is there twice: port number must be unique")
            numbers[number] = None
        declared.append((port.at("appProtocol"), port.choice("appProtocol", _PROTOCOLS)))
    return tuple(numbers), declared


def _protocol(spec: Fields, declared: list[tuple[str, AppProtocol | None]]) -> tuple[AppProtocol, Any]:
    """proposal-2162 put the field on each port and wanted all of them to agree; what was merged is one field in `spec`."""
    report = spec.report
    merged = spec.choice("appProtocol", _PROTOCOLS)
    if "appProtocol" in spec.found:
        report.since(_APP_PROTOCOL, spec.at("appProtocol"), "the field is there since GAIE 1.4, and unknown to the API server before")
    written = [(path, value) for path, value in declared if value is not None]
    if not written:
        return merged or "http", "spec.appProtocol" if merged else ""
    first = declared[0][1]
    for path, value in declared[1:]:
        if value != first:
            report.error(
                path, f"{value or 'unset'}, where {declared[0][0]} is {first or 'unset'}: all ports must have the same appProtocol"
            )
    for path, value in written:
        report.never(
            path, "the shape of proposal-2162, in no GAIE release: 1.4 and later have spec.appProtocol, their CRDs do not know this"
        )
        if merged is not None and value != merged:
            report.error(path, f"{value}, where {spec.at('appProtocol')} is {merged}")
    return merged or written[0][1] or "http", "spec.appProtocol" if merged else "spec.targetPorts[].appProtocol"


def _picker(spec: Fields) -> EndpointPickerRef | None:
    report = spec.report
    path = spec.at("endpointPickerRef")
    picker = spec.fields("endpointPickerRef", ("group", "kind", "name", "port", "failureMode"), hints=_HINTS)
    if picker is None:
        if "endpointPickerRef" not in spec.found:
            report.since(_OPTIONAL_PICKER, path, "required by GAIE before 1.6")
        return None
    group = picker.text("group", pattern=GROUP, high=253)
    kind = picker.text("kind", pattern=KIND, low=1, high=63)
    name = picker.text("name", required=True, low=1, high=253)
    port = picker.fields("port", ("number",), hints=_HINTS)
    number = port.integer("number", 1, 65535, required=True) if port is not None else None
    if "port" not in picker.found and ("kind" not in picker.found or kind == "Service"):
        report.error(picker.at("port"), "required when kind is 'Service' or unspecified (defaults to 'Service')")
    mode = picker.choice("failureMode", _FAILURE_MODES)
    return EndpointPickerRef(name=name or "", group=group or "", kind=kind or "Service", port=number, failure_mode=mode or "FailClose")
