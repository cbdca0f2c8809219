{{/*
Arguments of QEMU, as a YAML list. Takes the settings and what the VM is like:
  include "vsock-sidecar-lib.qemuArgs" (dict "settings" .Values.vsockSidecar "memory" "1G")
`memory` is the guest's, in QEMU's words. The sidecar reads and writes guest memory, so it must be shared, and QEMU does not say
so when it is not. Without `memory` the arguments are those of the device alone, and the memory is the caller's business.
No `reconnect=` on the chardev: QEMU does not start with it.
*/}}
{{- define "vsock-sidecar-lib.qemuArgs" -}}
{{- if not (and (kindIs "map" .) (empty (omit . "settings" "memory"))) }}
{{- fail "vsock-sidecar-lib.qemuArgs takes (dict \"settings\" SETTINGS \"memory\" \"1G\")" }}
{{- end }}
{{- with .memory }}
{{- if not (regexMatch "^[1-9][0-9]*[MGT]$" (toString .)) }}
{{- fail (printf "vsock-sidecar-lib.qemuArgs: `memory` is the guest's memory in QEMU's words, such as 512M or 4G, not `%v`" .) }}
{{- end }}
- -m
- {{ . | quote }}
- -object
- memory-backend-memfd,id=vsocksidecar0-mem,size={{ . }},share=on
- -machine
- memory-backend=vsocksidecar0-mem
{{- end }}
- -chardev
- socket,id=vsocksidecar0,path={{ include "vsock-sidecar-lib.socket" .settings }}
- -device
- vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0
{{- end }}

{{/* Arguments of Cloud Hypervisor, as a YAML list; `memory` as above, in Cloud Hypervisor's words, and required: it takes --memory once. */}}
{{- define "vsock-sidecar-lib.cloudHypervisorArgs" -}}
{{- if not (and (kindIs "map" .) (empty (omit . "settings" "memory"))) }}
{{- fail "vsock-sidecar-lib.cloudHypervisorArgs takes (dict \"settings\" SETTINGS \"memory\" \"1G\")" }}
{{- end }}
{{- if not (regexMatch "^[1-9][0-9]*[MGT]$" (toString .memory)) }}
{{- fail (printf "vsock-sidecar-lib.cloudHypervisorArgs: `memory` is the guest's memory, such as 512M or 4G, not `%v`" .memory) }}
{{- end }}
- --memory
- size={{ .memory }},shared=on
- --generic-vhost-user
- socket={{ include "vsock-sidecar-lib.socket" .settings }},device_type=vsock,queue_sizes=[128,128,128]
{{- end }}

{{/*
The CEL expression of a KubeVirt Plugin (plugin.kubevirt.io/v1alpha1, KubeVirt 1.9): memory of the domain shared, and the device among
QEMU's arguments. KubeVirt replaces lists as a whole, so what is there (ignition's -fw_cfg) is put in front. Names are those of
Go's types, as KubeVirt's evaluator for domains has them.
A domain that has the device already stays as it is: KubeVirt may ask more than once.
*/}}
{{- define "vsock-sidecar-lib.kubevirtPluginExpression" -}}
{{- $settings := set (. | default dict | deepCopy) "kubevirt" true -}}
Domain{
  MemoryBacking: DomainMemoryBacking{
    MemorySource: DomainMemorySource{Type: "memfd"},
    MemoryAccess: DomainMemoryAccess{Mode: "shared"}},
  QEMUCommandline: DomainQEMUCommandline{
    Args: (has(domainSpec.QEMUCommandline) ? domainSpec.QEMUCommandline.Args : []) + (
      has(domainSpec.QEMUCommandline) && domainSpec.QEMUCommandline.Args.exists(a, a.Value.contains("id=vsocksidecar0")) ? [] : [
        DomainQEMUCommandlineArg{Value: "-chardev"},
        DomainQEMUCommandlineArg{Value: "socket,id=vsocksidecar0,path={{ include "vsock-sidecar-lib.socket" $settings }}"},
        DomainQEMUCommandlineArg{Value: "-device"},
        DomainQEMUCommandlineArg{Value: "vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0"}])}}
{{- end }}

{{/* The condition of the same Plugin: VMs that ask for the sidecar. */}}
{{- define "vsock-sidecar-lib.kubevirtPluginCondition" -}}
"vsock-sidecar.io/inject" in vmi.Labels && vmi.Labels["vsock-sidecar.io/inject"] == "true"
{{- end }}
