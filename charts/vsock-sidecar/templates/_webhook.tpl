{{/* The Secret of the webhook's certificate. */}}
{{- define "vsock-sidecar.webhookSecret" -}}
{{- with .Values.injection.webhook.certificate }}
{{- if eq .source "secret" }}{{ .secretName }}{{ else }}{{ include "vsock-sidecar.webhookName" $ }}-tls{{ end }}
{{- end }}
{{- end }}

{{/*
With `source: helm`: ca.crt, tls.crt and tls.key, base64. Those of the cluster if they are there and are for this name, so that an upgrade
changes nothing; else new ones, which `helm template` therefore makes each time. Rendered once, by the one file that uses it in two
places: two calls would be two authorities.
*/}}
{{- define "vsock-sidecar.webhookCertificate" -}}
{{- $name := include "vsock-sidecar.webhookName" . }}
{{- $host := printf "%s.%s.svc" $name .Release.Namespace }}
{{- $there := lookup "v1" "Secret" .Release.Namespace (include "vsock-sidecar.webhookSecret" .) | default dict }}
{{- $data := $there.data | default dict }}
{{- $for := dig "metadata" "annotations" "vsock-sidecar.io/certificate-for" "" $there }}
{{- if and (eq $for $host) (index $data "ca.crt") (index $data "tls.crt") (index $data "tls.key") }}
{{- toYaml (pick $data "ca.crt" "tls.crt" "tls.key") }}
{{- else }}
{{- $days := int .Values.injection.webhook.certificate.validityDays }}
{{- $ca := genCA (printf "%s CA" $name) $days }}
{{- $certificate := genSignedCert $host nil (list $host (printf "%s.cluster.local" $host)) $days $ca }}
ca.crt: {{ $ca.Cert | b64enc }}
tls.crt: {{ $certificate.Cert | b64enc }}
tls.key: {{ $certificate.Key | b64enc }}
{{- end }}
{{- end }}

{{/* What `webhook --config` reads. */}}
{{- define "vsock-sidecar.webhookSettings" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
resources:
  {{- toYaml .Values.sidecar.resources | nindent 2 }}
guaranteedResources:
  {{- toYaml .Values.sidecar.guaranteedResources | nindent 2 }}
{{- end }}
