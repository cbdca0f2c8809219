{{/*
What values.schema.json cannot say: values that contradict each other. Each message names the value and what to do. Included by
configmap.yaml, which is rendered in every release.
*/}}
{{- define "vsock-sidecar.validate" -}}
{{- $admin := include "vsock-sidecar-lib.adminUrl" . }}
{{- $config := .Values.config }}
{{- if .Values.configMap.create }}
  {{- $listen := dig "admin" "listen" list $config }}
  {{- if not (has $admin $listen) }}
    {{- fail (printf "\n\nconfig.admin.listen has no %s, where the container's probes ask: add it to the list" $admin) }}
  {{- end }}
  {{- $port := false }}
  {{- range $listen }}{{ if and (hasPrefix "tcp://" .) (hasSuffix ":9464" .) }}{{ $port = true }}{{ end }}{{ end }}
  {{- if and .Values.metrics.podMonitor.enabled (not $port) }}
    {{- fail "\n\nmetrics.podMonitor.enabled: config.admin.listen has no tcp:// address with port 9464, which Prometheus scrapes: add tcp://0.0.0.0:9464" }}
  {{- end }}
  {{- $kubevirt := false }}
  {{- range $guest := $config.guests }}
    {{- $socket := $guest.vhostUser.socket }}
    {{- $known := false }}
    {{- range list "/run/vsock-sidecar/" "/var/run/kubevirt-plugin/vsock-sidecar/" "/var/run/kubevirt-hooks/" }}
      {{- if hasPrefix . $socket }}{{ $known = true }}{{ end }}
    {{- end }}
    {{- if not $known }}
      {{- fail (printf "\n\nconfig.guests: the socket %s of guest %s is where the VMM's container cannot see it: put it into /run/vsock-sidecar/, or for KubeVirt into /var/run/kubevirt-plugin/vsock-sidecar/" $socket $guest.name) }}
    {{- end }}
    {{- if eq $socket "/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock" }}{{ $kubevirt = true }}{{ end }}
  {{- end }}
  {{- if and .Values.kubevirt.plugin.enabled (not $kubevirt) }}
    {{- fail "\n\nkubevirt.plugin.enabled: no guest of `config` has the socket that KubeVirt's VMM is given: set its vhostUser.socket to /var/run/kubevirt-plugin/vsock-sidecar/vsock.sock, or set configMap.create to false if the VMs have ConfigMaps of their own" }}
  {{- end }}
{{- end }}
{{- if and .Values.kubevirt.plugin.enabled (eq .Values.injection.mode "none") }}
  {{- fail "\n\nkubevirt.plugin.enabled: the Plugin adds a device to the domain, and nothing adds the sidecar that serves it: set injection.mode to policy or webhook" }}
{{- end }}
{{- if and (or .Values.sampleVM.enabled) (not .Values.configMap.create) (not .Values.configMap.name) }}
  {{- fail "\n\nsampleVM.enabled: the pod needs a configuration: set configMap.create to true, or configMap.name to a ConfigMap of this namespace" }}
{{- end }}
{{- if and .Values.sampleVM.enabled (not .Values.sampleVM.image) }}
  {{- fail "\n\nsampleVM.enabled: set sampleVM.image to an image with QEMU and a guest; this chart has none" }}
{{- end }}
{{- if and .Values.metrics.webhookPodMonitor.enabled (ne .Values.injection.mode "webhook") }}
  {{- fail "\n\nmetrics.webhookPodMonitor.enabled: there is no webhook to watch: set injection.mode to webhook, or this to false" }}
{{- end }}
{{- range $where, $labels := dict "commonLabels" .Values.commonLabels "injection.webhook.podLabels" .Values.injection.webhook.podLabels }}
  {{- range $label := list "vsock-sidecar.io/inject" "vsock-sidecar.io/injected" }}
    {{- if hasKey $labels $label }}
      {{- fail (printf "\n\n%s has %s, which is for VM pods: with it the webhook's own pods would wait for the webhook, or have the VMs' NetworkPolicy; remove it" $where $label) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- with .Values.injection.webhook }}
  {{- if eq $.Values.injection.mode "webhook" }}
    {{- if not (regexMatch "^[a-z]" (include "vsock-sidecar.webhookName" $)) }}
      {{- fail (printf "\n\nthe webhook's Service would be called %s, and a Service's name begins with a letter: set fullnameOverride" (include "vsock-sidecar.webhookName" $)) }}
    {{- end }}
    {{- if and (eq .certificate.source "secret") (or (not .certificate.secretName) (not .certificate.caBundle)) }}
      {{- fail "\n\ninjection.webhook.certificate.source is secret: set secretName to the Secret with tls.crt and tls.key, and caBundle to the PEM certificate of the authority that signed it" }}
    {{- end }}
    {{- if and .podDisruptionBudget.enabled (lt (int .replicas) 2) }}
      {{- fail "\n\ninjection.webhook.replicas is 1: a PodDisruptionBudget over one pod forbids or means nothing: set podDisruptionBudget.enabled to false, or replicas to 2" }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
