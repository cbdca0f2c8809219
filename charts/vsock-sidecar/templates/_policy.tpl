{{/*
Which version of MutatingAdmissionPolicy is asked for. A cluster says which kinds it serves; `helm template` without a cluster knows
groups only, and goes by the version of Kubernetes.
*/}}
{{- define "vsock-sidecar.policyApiVersion" -}}
{{- $group := "admissionregistration.k8s.io" }}
{{- $found := .Values.injection.policy.apiVersion }}
{{- range list "v1" "v1beta1" "v1alpha1" }}
  {{- if and (not $found) ($.Capabilities.APIVersions.Has (printf "%s/%s/MutatingAdmissionPolicy" $group .)) }}
    {{- $found = printf "%s/%s" $group . }}
  {{- end }}
{{- end }}
{{- if and (not $found) (not (.Capabilities.APIVersions.Has "v1/Pod")) }}
  {{- if semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version }}
    {{- $found = printf "%s/v1" $group }}
  {{- else if semverCompare ">=1.34.0-0" .Capabilities.KubeVersion.Version }}
    {{- $found = printf "%s/v1beta1" $group }}
  {{- else if semverCompare ">=1.32.0-0" .Capabilities.KubeVersion.Version }}
    {{- $found = printf "%s/v1alpha1" $group }}
  {{- end }}
{{- end }}
{{- if not $found }}
  {{- fail (printf "\n\ninjection.mode is policy, and this cluster (Kubernetes %s) serves no MutatingAdmissionPolicy: it is on from 1.36, and from 1.32 with the feature gate MutatingAdmissionPolicy and the API group's version turned on; set injection.mode to webhook" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- $found }}
{{- end }}

{{/* Pods that are made, and have the label. */}}
{{- define "vsock-sidecar.policyMatch" -}}
matchPolicy: Equivalent
objectSelector:
  matchLabels:
    vsock-sidecar.io/inject: "true"
namespaceSelector:
  {{- include "vsock-sidecar.namespaceSelector" (dict "root" .) | nindent 2 }}
resourceRules:
  - apiGroups: [""]
    apiVersions: [v1]
    operations: [CREATE]
    resources: [pods]
    scope: Namespaced
{{- end }}

{{/* KubeVirt's volume has a directory for each plugin; compute has the whole volume, so that the path is the same in both. */}}
{{- define "vsock-sidecar.kubevirtMount" -}}
{{- $settings := set (include "vsock-sidecar.settings" . | fromYaml) "kubevirt" true }}
{{- range (include "vsock-sidecar-lib.container" $settings | fromYaml).volumeMounts }}
{{- if eq .name "kubevirt-plugin-sockets" }}{{ toYaml . }}{{ end }}
{{- end }}
{{- end }}

{{/* Conditions. They stand for themselves: a matchCondition sees no variables. */}}
{{- define "vsock-sidecar.celHasNoSidecar" -}}
!(object.spec.containers + (has(object.spec.initContainers) ? object.spec.initContainers : [])).exists(c, c.name == "vsock-sidecar")
{{- end }}

{{- define "vsock-sidecar.celNamesConfig" -}}
has(object.metadata.annotations) && "vsock-sidecar.io/config" in object.metadata.annotations && size(object.metadata.annotations["vsock-sidecar.io/config"]) <= 253 && object.metadata.annotations["vsock-sidecar.io/config"].matches("^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
{{- end }}

{{- define "vsock-sidecar.celNamesVmm" -}}
!has(object.metadata.annotations) || !("vsock-sidecar.io/vmm-container" in object.metadata.annotations) || object.spec.containers.exists(c, c.name == object.metadata.annotations["vsock-sidecar.io/vmm-container"])
{{- end }}

{{- define "vsock-sidecar.celOnLinux" -}}
!(has(object.spec.os) && object.spec.os.name == "windows") && !(has(object.spec.nodeSelector) && "kubernetes.io/os" in object.spec.nodeSelector && object.spec.nodeSelector["kubernetes.io/os"] == "windows")
{{- end }}

{{- define "vsock-sidecar.celHasPlugins" -}}
!("kubevirt.io" in object.metadata.labels && object.metadata.labels["kubevirt.io"] == "virt-launcher") || (has(object.spec.volumes) && object.spec.volumes.exists(v, v.name == "kubevirt-plugin-sockets"))
{{- end }}

{{/* Variables of both policies. */}}
{{- define "vsock-sidecar.celVariables" -}}
- name: kubevirt
  expression: |-
    "kubevirt.io" in object.metadata.labels && object.metadata.labels["kubevirt.io"] == "virt-launcher"
- name: vmmName
  expression: |-
    has(object.metadata.annotations) && "vsock-sidecar.io/vmm-container" in object.metadata.annotations ?
      object.metadata.annotations["vsock-sidecar.io/vmm-container"] :
      (object.spec.containers.exists(c, c.name == "compute") ? "compute" : object.spec.containers[0].name)
# -1 for a name that is not there: the mutating policy does not match such a pod, the validating one refuses it.
- name: vmmIndex
  expression: |-
    object.spec.containers.map(c, c.name).indexOf(variables.vmmName)
- name: vmm
  expression: |-
    object.spec.containers[variables.vmmIndex < 0 ? 0 : variables.vmmIndex]
- name: vmmMounts
  expression: |-
    has(variables.vmm.volumeMounts) ? variables.vmm.volumeMounts : []
{{- end }}

{{/* What a pod with the label must be in the end. Where several fail, the API server reports the first. */}}
{{- define "vsock-sidecar.policyValidations" -}}
- expression: {{ include "vsock-sidecar.celNamesConfig" . | quote }}
  message: >-
    the pod asks for vsock-sidecar (label vsock-sidecar.io/inject), and its annotation vsock-sidecar.io/config names no ConfigMap: set it to the
    name of the ConfigMap whose key config.yaml is the sidecar's configuration
- expression: {{ include "vsock-sidecar.celNamesVmm" . | quote }}
  message: >-
    annotation vsock-sidecar.io/vmm-container: spec.containers has no container of that name: name the one that runs the VMM, or leave the
    annotation out for `compute` or the first
- expression: {{ include "vsock-sidecar.celOnLinux" . | quote }}
  message: >-
    the pod runs on Windows, and vhost-user needs Linux: remove the label vsock-sidecar.io/inject
- expression: |-
    !object.spec.containers.exists(c, c.name == "vsock-sidecar") &&
    (size(variables.sidecars) == 0 || ("vsock-sidecar.io/injected" in object.metadata.labels && object.metadata.labels["vsock-sidecar.io/injected"] == "true"))
  message: >-
    a container of the pod is called vsock-sidecar and was not put there by the injector: rename it, or, if it is the sidecar, remove the label
    vsock-sidecar.io/inject, since a pod has one sidecar
- expression: |-
    {{ include "vsock-sidecar.celHasPlugins" . }}
  message: >-
    the pod is KubeVirt's virt-launcher and has no volume kubevirt-plugin-sockets: turn on KubeVirt's feature gate Plugins (from 1.9), or remove
    the label vsock-sidecar.io/inject from the VMI and use a hook sidecar
- expression: |-
    !variables.kubevirt || variables.vmmMounts.exists(m, m.name == "kubevirt-plugin-sockets" && m.mountPath.matches("^/var/run/kubevirt-plugin/?$") &&
      !has(m.subPath) && !has(m.subPathExpr))
  message: >-
    the VMM's container does not mount volume kubevirt-plugin-sockets at /var/run/kubevirt-plugin: this is no pod as KubeVirt makes them from 1.9
    with the feature gate Plugins; annotation vsock-sidecar.io/vmm-container has to name KubeVirt's own container, if it is there
- expression: |-
    size(variables.sidecars) == 1 && has(variables.sidecars[0].restartPolicy) && variables.sidecars[0].restartPolicy == "Always" &&
    has(variables.sidecars[0].startupProbe) && has(variables.sidecars[0].volumeMounts) &&
    variables.sidecars[0].volumeMounts.exists(m, m.name == "vsock-sidecar-config" && m.mountPath.matches("^/etc/vsock-sidecar/?$") &&
      !has(m.subPath) && !has(m.subPathExpr)) &&
    variables.sidecars[0].volumeMounts.exists(m, m.name == "vsock-sidecar-admin" && m.mountPath.matches("^/run/vsock-sidecar-admin/?$") &&
      !has(m.subPath) && !has(m.subPathExpr)) &&
    variables.sidecars[0].volumeMounts.exists(m, !has(m.subPathExpr) && (variables.kubevirt ?
      m.name == "kubevirt-plugin-sockets" && m.mountPath.matches("^/var/run/kubevirt-plugin/vsock-sidecar/?$") && has(m.subPath) && m.subPath == "vsock-sidecar" :
      m.name == "vsock-sidecar-socket" && m.mountPath.matches("^/run/vsock-sidecar/?$") && !has(m.subPath)))
  message: >-
    the pod has no whole vsock-sidecar among its init containers: remove what there is of it from the manifest, and the injector puts in a whole
    one; if nothing was there, the binding of the MutatingAdmissionPolicy is missing or leaves out this namespace
- expression: |-
    has(object.spec.volumes) &&
    object.spec.volumes.exists(v, v.name == "vsock-sidecar-config" && has(v.configMap) && v.configMap.name == object.metadata.annotations["vsock-sidecar.io/config"]) &&
    object.spec.volumes.exists(v, v.name == "vsock-sidecar-admin" && has(v.emptyDir)) &&
    (variables.kubevirt || object.spec.volumes.exists(v, v.name == "vsock-sidecar-socket" && has(v.emptyDir)))
  message: >-
    a volume of the pod is called vsock-sidecar-config, vsock-sidecar-admin or vsock-sidecar-socket and is not what the injector would have put
    there (the ConfigMap of annotation vsock-sidecar.io/config, an emptyDir, an emptyDir): rename it
- expression: |-
    variables.kubevirt || variables.vmmMounts.exists(m, m.name == "vsock-sidecar-socket" && m.mountPath.matches("^/run/vsock-sidecar/?$") &&
      !has(m.subPath) && !has(m.subPathExpr))
  message: >-
    the VMM's container does not mount volume vsock-sidecar-socket at /run/vsock-sidecar, where it finds the sidecar's socket: something else is
    mounted there, move it elsewhere, or a part of the volume (subPath), mount all of it
{{- end }}
