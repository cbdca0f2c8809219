{{/*
The settings that every template of this chart takes, as one mapping: what the caller gives, laid over the defaults below. The
caller's mapping is usually a part of its values. A key that is not here is refused, since a misspelt one would be silence.
*/}}
{{- define "vsock-sidecar-lib.defaults" -}}
image:
  repository: vsock-sidecar
  tag: {{ include "vsock-sidecar-lib.appVersion" . | quote }}
  digest: ""
  pullPolicy: IfNotPresent
configMap: ""
kubevirt: false
socketName: vsock.sock
metricsPort: 9464
resources:
  requests: {cpu: 50m, memory: 64Mi}
startupProbe: {periodSeconds: 1, failureThreshold: 60, timeoutSeconds: 2}
readinessProbe: {periodSeconds: 10, failureThreshold: 3, timeoutSeconds: 5}
livenessProbe: {enabled: true, periodSeconds: 20, failureThreshold: 6, timeoutSeconds: 5}
env: []
volumeMounts: []
{{- end }}

{{/*
The version of vsock-sidecar that this chart belongs to: the image's tag unless another is given. A test holds it to Chart.yaml;
a library does not see its own Chart.yaml, only that of the chart that uses it.
*/}}
{{- define "vsock-sidecar-lib.appVersion" -}}
0.1.0
{{- end }}

{{/* The settings, complete, as YAML. A given null is kept where it has a meaning: `runAsUser: null` leaves the user to the pod. */}}
{{- define "vsock-sidecar-lib.settings" -}}
{{- $given := . | default dict }}
{{- if not (kindIs "map" $given) }}
{{- fail (printf "vsock-sidecar-lib: the templates take one mapping of settings, not %s; see the README of the chart vsock-sidecar-lib" (kindOf $given)) }}
{{- end }}
{{- $defaults := include "vsock-sidecar-lib.defaults" . | fromYaml }}
{{- $known := append (keys $defaults) "runAsUser" | sortAlpha }}
{{- range $key, $value := $given }}
{{- if not (has $key $known) }}
{{- fail (printf "vsock-sidecar-lib: unknown setting `%s`; there are: %s" $key (join ", " $known)) }}
{{- end }}
{{- $default := get $defaults $key }}
{{- if and (kindIs "map" $default) (not (kindIs "map" $value)) }}
{{- fail (printf "vsock-sidecar-lib: the setting `%s` is a mapping" $key) }}
{{- end }}
{{- if kindIs "map" $value }}
{{- range $inner, $_ := $value }}
{{- if and (ne $key "resources") (not (hasKey $default $inner)) }}
{{- fail (printf "vsock-sidecar-lib: unknown setting `%s.%s`; there are: %s" $key $inner (keys $default | sortAlpha | join ", ")) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $settings := mergeOverwrite $defaults (omit $given "resources" "runAsUser" | deepCopy) }}
{{- if hasKey $given "resources" }}
{{- /* Whole, not merged: who gives limits only wants no request of ours beside them. */}}
{{- $_ := set $settings "resources" $given.resources }}
{{- end }}
{{- if not $settings.image.tag }}
{{- $_ := set $settings.image "tag" (include "vsock-sidecar-lib.appVersion" .) }}
{{- end }}
{{- if hasKey $given "runAsUser" }}
{{- $_ := set $settings "runAsUser" $given.runAsUser }}
{{- else if $settings.kubevirt }}
{{- /* KubeVirt's pods say 107 for every container; the files in its volumes are that user's. */}}
{{- $_ := set $settings "runAsUser" nil }}
{{- else }}
{{- $_ := set $settings "runAsUser" 65532 }}
{{- end }}
{{- if and (not (kindIs "invalid" $settings.runAsUser)) (eq (toString $settings.runAsUser) "0") }}
{{- fail "vsock-sidecar-lib: `runAsUser: 0` is root, and the container says runAsNonRoot; give another user, or null to leave it to the pod" }}
{{- end }}
{{- if not (regexMatch "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}\\.sock$" $settings.socketName) }}
{{- fail (printf "vsock-sidecar-lib: `socketName` is the name of a file that ends in .sock, without a directory, not `%s`" $settings.socketName) }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{/* The image's reference. A digest says more than a tag, which then stands for people only. */}}
{{- define "vsock-sidecar-lib.image" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- with $settings.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository .tag }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where the vhost-user socket is, the same path in the sidecar and in the VMM's container. */}}
{{- define "vsock-sidecar-lib.socketDirectory" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- if $settings.kubevirt }}/var/run/kubevirt-plugin/vsock-sidecar{{ else }}/run/vsock-sidecar{{ end }}
{{- end }}

{{- define "vsock-sidecar-lib.socket" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- printf "%s/%s" (include "vsock-sidecar-lib.socketDirectory" .) $settings.socketName }}
{{- end }}

{{/* Where the admin server listens for the probes. A volume of its own: who shares the vhost-user socket needs no admin socket. */}}
{{- define "vsock-sidecar-lib.adminUrl" -}}
unix:///run/vsock-sidecar-admin/admin.sock
{{- end }}
