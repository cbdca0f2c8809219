{{/* Names. */}}
{{- define "vsock-sidecar.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "vsock-sidecar.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Cluster-wide kinds have no namespace to tell two releases apart. */}}
{{- define "vsock-sidecar.injectorName" -}}
{{- printf "%s-injector" (include "vsock-sidecar.fullname" .) }}
{{- end }}

{{- define "vsock-sidecar.webhookName" -}}
{{- printf "%s-webhook" (include "vsock-sidecar.fullname" .) }}
{{- end }}

{{- define "vsock-sidecar.configMapName" -}}
{{- default (printf "%s-config" (include "vsock-sidecar.fullname" .)) .Values.configMap.name }}
{{- end }}

{{/*
Metadata: include "vsock-sidecar.metadata" (dict "root" $ "name" NAME "component" COMPONENT), with "labels" and "annotations" of its
own if need be, and "cluster" true for kinds without a namespace.
Names are quoted, here and wherever one stands alone: releases and namespaces may be called 123, 1e3 or on, which YAML takes for something else.
*/}}
{{- define "vsock-sidecar.metadata" -}}
name: {{ .name | quote }}
{{- if not .cluster }}
namespace: {{ .root.Release.Namespace | quote }}
{{- end }}
labels:
  {{- $own := include "vsock-sidecar.labels" . | fromYaml }}
  {{- toYaml (mergeOverwrite (dict) .root.Values.commonLabels (.labels | default dict) $own) | nindent 2 }}
{{- with mergeOverwrite (dict) .root.Values.commonAnnotations (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "vsock-sidecar.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
app.kubernetes.io/part-of: vsock-sidecar
{{ include "vsock-sidecar.selectorLabels" . }}
{{- end }}

{{/* Labels that select pods. They never change over upgrades. */}}
{{- define "vsock-sidecar.selectorLabels" -}}
app.kubernetes.io/name: {{ include "vsock-sidecar.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The settings of the library chart, made of the values. */}}
{{- define "vsock-sidecar.settings" -}}
image:
  {{- toYaml .Values.image | nindent 2 }}
  {{- if not .Values.image.tag }}
  tag: {{ .Chart.AppVersion | quote }}
  {{- end }}
configMap: {{ include "vsock-sidecar.configMapName" . | quote }}
resources:
  {{- toYaml .Values.sidecar.resources | nindent 2 }}
{{- end }}

{{- define "vsock-sidecar.image" -}}
{{- include "vsock-sidecar-lib.image" (include "vsock-sidecar.settings" . | fromYaml) }}
{{- end }}

{{- define "vsock-sidecar.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Whether a pod of the release's own namespace gets the sidecar by its label; else the chart's test pod has it in its manifest. */}}
{{- define "vsock-sidecar.injectsHere" -}}
{{- $mode := .Values.injection.mode }}
{{- $left := has .Release.Namespace .Values.injection.excludedNamespaces }}
{{- if and (eq $mode "policy") (not $left) (empty .Values.injection.namespaceSelector) }}true{{ end }}
{{- if and (eq $mode "webhook") (not $left) (empty .Values.injection.namespaceSelector) (not .Values.injection.webhook.excludeReleaseNamespace) }}true{{ end }}
{{- end }}

{{/* Which namespaces' pods are looked at, as in a webhook's namespaceSelector. */}}
{{- define "vsock-sidecar.namespaceSelector" -}}
{{- $root := .root }}
{{- $excluded := concat .root.Values.injection.excludedNamespaces (.also | default list) | uniq | sortAlpha }}
{{- $selector := .root.Values.injection.namespaceSelector | deepCopy }}
{{- $expressions := $selector.matchExpressions | default list }}
{{- with $excluded }}
{{- $expressions = append $expressions (dict "key" "kubernetes.io/metadata.name" "operator" "NotIn" "values" .) }}
{{- end }}
{{- with $expressions }}
{{- $_ := set $selector "matchExpressions" . }}
{{- end }}
{{- toYaml $selector }}
{{- end }}
