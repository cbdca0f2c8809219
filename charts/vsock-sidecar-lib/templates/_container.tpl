{{/*
The sidecar's container, as one element of `initContainers`. Put it FIRST: with `restartPolicy: Always` it is a native sidecar, and
the containers behind it start when its startup probe has succeeded, which is when the vhost-user socket exists. QEMU ends at
once when its chardev's socket is not there.

The probes are exec over a unix socket: KubeVirt's masquerade hands what comes to the pod's address, and to 127.0.0.1 in the pod,
to the guest.
*/}}
{{- define "vsock-sidecar-lib.container" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- if not $settings.configMap }}
{{- fail "vsock-sidecar-lib: give `configMap`, the name of the ConfigMap that has the sidecar's configuration under the key config.yaml" }}
{{- end }}
name: vsock-sidecar
image: {{ include "vsock-sidecar-lib.image" . | quote }}
imagePullPolicy: {{ $settings.image.pullPolicy }}
args: [run, --config, /etc/vsock-sidecar/config.yaml]
restartPolicy: Always
env:
  - name: VSOCK_SIDECAR_ADMIN
    value: {{ include "vsock-sidecar-lib.adminUrl" . }}
  {{- with $settings.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: vsock-metrics
    containerPort: {{ $settings.metricsPort | int64 }}
    protocol: TCP
startupProbe:
  exec:
    command: [/vsock-sidecar, probe, startup]
  {{- toYaml $settings.startupProbe | nindent 2 }}
readinessProbe:
  exec:
    command: [/vsock-sidecar, probe, ready]
  {{- toYaml $settings.readinessProbe | nindent 2 }}
{{- if $settings.livenessProbe.enabled }}
livenessProbe:
  exec:
    command: [/vsock-sidecar, probe, live]
  {{- toYaml (omit $settings.livenessProbe "enabled") | nindent 2 }}
{{- end }}
resources:
  {{- toYaml $settings.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  {{- if not (kindIs "invalid" $settings.runAsUser) }}
  {{- /* By int64: Go writes OpenShift's 1000680000 as 1.00068e+09 otherwise. */}}
  runAsUser: {{ $settings.runAsUser | int64 }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- /* The one line with which a bad configuration ends the sidecar shows in `kubectl describe`. */}}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: vsock-sidecar-config
    mountPath: /etc/vsock-sidecar
    readOnly: true
  {{- if $settings.kubevirt }}
  - name: kubevirt-plugin-sockets
    mountPath: {{ include "vsock-sidecar-lib.socketDirectory" . }}
    subPath: vsock-sidecar
  {{- else }}
  - name: vsock-sidecar-socket
    mountPath: {{ include "vsock-sidecar-lib.socketDirectory" . }}
  {{- end }}
  - name: vsock-sidecar-admin
    mountPath: /run/vsock-sidecar-admin
  {{- with $settings.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/*
The pod's volumes, as elements of `volumes`. The ConfigMap is mounted as a directory: a mount by subPath never sees a change of it.
In KubeVirt's plugin form KubeVirt itself adds the volume of the socket.
*/}}
{{- define "vsock-sidecar-lib.volumes" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- if not $settings.configMap }}
{{- fail "vsock-sidecar-lib: give `configMap`, the name of the ConfigMap that has the sidecar's configuration under the key config.yaml" }}
{{- end }}
- name: vsock-sidecar-config
  configMap:
    name: {{ $settings.configMap | quote }}
{{- if not $settings.kubevirt }}
- name: vsock-sidecar-socket
  emptyDir: {}
{{- end }}
- name: vsock-sidecar-admin
  emptyDir: {}
{{- end }}

{{/* What the VMM's container needs, as an element of its `volumeMounts`. Nothing under KubeVirt, which mounts its own volume. */}}
{{- define "vsock-sidecar-lib.vmmVolumeMounts" -}}
{{- $settings := include "vsock-sidecar-lib.settings" . | fromYaml }}
{{- if not $settings.kubevirt }}
- name: vsock-sidecar-socket
  mountPath: {{ include "vsock-sidecar-lib.socketDirectory" . }}
{{- end }}
{{- end }}

{{/* The pod's labels. The PodMonitor of the chart vsock-sidecar selects by this one. */}}
{{- define "vsock-sidecar-lib.podLabels" -}}
vsock-sidecar.io/injected: "true"
{{- end }}

{{/* The pod's annotations. */}}
{{- define "vsock-sidecar-lib.podAnnotations" -}}
vsock-sidecar.io/version: {{ include "vsock-sidecar-lib.appVersion" . | quote }}
{{- end }}
