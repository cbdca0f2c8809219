{{/*
A YAML value as a CEL literal: the MutatingAdmissionPolicy is made of the library chart's own container, so that there is one truth.
  include "vsock-sidecar.cel" (dict "value" VALUE "path" "Object.spec.initContainers" "indent" 0)
Mappings become objects of the type that a policy has for that path (`Object.spec.initContainers{…}`): a literal map may not
have values of different types in Kubernetes' CEL. Where a key is no identifier (`hugepages-2Mi`), it is a literal map all the same, and
its values, which are quantities, become texts. A text that begins with `CEL:` is an expression and goes in as it is.
*/}}
{{- define "vsock-sidecar.cel" -}}
{{- $pad := repeat (int .indent) " " }}
{{- $next := add (int .indent) 2 }}
{{- if kindIs "map" .value }}
  {{- $plain := true }}
  {{- range $key, $_ := .value }}
    {{- if or (not (regexMatch "^[A-Za-z_][A-Za-z0-9_]*$" $key)) (has $key (list "in" "as" "break" "const" "continue" "else" "false" "for" "function" "if" "import" "let" "loop" "namespace" "null" "package" "return" "true" "var" "void" "while")) }}
      {{- $plain = false }}
    {{- end }}
  {{- end }}
  {{- if $plain }}{{ .path }}{{ end }}{{ print "{" }}
  {{- $path := .path }}
  {{- $value := .value }}
  {{- range $i, $key := keys .value | sortAlpha }}
    {{- if $i }},{{ end }}
    {{- print "\n" $pad "  " }}
    {{- if $plain }}{{ $key }}{{ else }}{{ toJson $key }}{{ end }}: {{ include "vsock-sidecar.cel" (dict "value" (ternary (get $value $key) (get $value $key | toString) $plain) "path" (printf "%s.%s" $path $key) "indent" $next) }}
  {{- end }}
  {{- print "}" }}
{{- else if kindIs "slice" .value }}
  {{- print "[" }}
  {{- $path := .path }}
  {{- $indent := .indent }}
  {{- range $i, $element := .value }}
    {{- if $i }}, {{ end }}
    {{- include "vsock-sidecar.cel" (dict "value" $element "path" $path "indent" $next) }}
  {{- end }}
  {{- print "]" }}
{{- else if kindIs "string" .value }}
  {{- if hasPrefix "CEL:" .value }}{{ trimPrefix "CEL:" .value }}{{ else }}{{ toJson .value }}{{ end }}
{{- else if kindIs "bool" .value }}{{ .value }}
{{- else if kindIs "invalid" .value }}null
{{- else }}{{ int64 .value }}
{{- end }}
{{- end }}

{{/* The container without what depends on the pod: resources, user, and the mount of the socket. */}}
{{- define "vsock-sidecar.celContainer" -}}
{{- $settings := include "vsock-sidecar.settings" . | fromYaml }}
{{- $_ := set $settings "configMap" "-" }}
{{- $_ := set $settings "runAsUser" nil }}
{{- $container := include "vsock-sidecar-lib.container" $settings | fromYaml }}
{{- $mounts := list }}
{{- range $container.volumeMounts }}
{{- if ne .name "vsock-sidecar-socket" }}{{ $mounts = append $mounts . }}{{ end }}
{{- end }}
{{- $_ := set $container "volumeMounts" $mounts }}
{{- $container = omit $container "resources" }}
{{- include "vsock-sidecar.cel" (dict "value" $container "path" "Object.spec.initContainers" "indent" 2) }}
{{- end }}
