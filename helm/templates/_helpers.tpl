{{- define "slimpajama.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* 52 characters leave room for "-download" and for the hashes of pods in a label's 63. */ -}}
{{- define "slimpajama.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "slimpajama.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "slimpajama.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Never changes in the life of a release: a Deployment's selector cannot. */ -}}
{{- define "slimpajama.selectorLabels" -}}
app.kubernetes.io/name: {{ include "slimpajama.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "slimpajama.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: slimpajama
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "slimpajama.labels" -}}
{{ include "slimpajama.selectorLabels" . }}
{{ include "slimpajama.commonLabels" . }}
{{- end }}

{{- define "slimpajama.image" -}}
{{- $variant := ternary "cu13" "cpu" (eq .Values.accelerator.type "nvidia") }}
{{- $name := ternary .Values.image.repository (printf "%s/%s" .Values.image.registry .Values.image.repository) (empty .Values.image.registry) }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" $name .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default (printf "%s-%s" .Chart.AppVersion $variant) .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "slimpajama.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "slimpajama.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* preStop + drain, 5 s in which the last bytes of answers leave, 10 s for the worker's end. */ -}}
{{- define "slimpajama.shortestGrace" -}}
{{- add (int .Values.lifecycle.preStopSleepSeconds) (int .Values.lifecycle.drainTimeoutSeconds) 15 }}
{{- end }}

{{- define "slimpajama.scheme" -}}
{{- ternary "HTTP" "HTTPS" (empty .Values.tls.existingSecret) }}
{{- end }}

{{- /* Whole CPUs of a container, at least one; empty where none are said. */ -}}
{{- define "slimpajama.cpus" -}}
{{- $resources := .Values.resources }}
{{- $cpus := dig "limits" "cpu" (dig "requests" "cpu" "" $resources) $resources | toString }}
{{- if hasSuffix "m" $cpus }}
{{- max 1 (div (trimSuffix "m" $cpus | int) 1000) }}
{{- else if $cpus }}
{{- max 1 (floor (float64 $cpus) | int) }}
{{- end }}
{{- end }}

{{- define "slimpajama.hubModels" -}}
{{- $hub := list }}
{{- range .Values.models }}
{{- if .hub }}
{{- $hub = append $hub (dict "name" .name "repository" .hub.repository "revision" (default "" .hub.revision) "adapter" (default false .adapter) "folder" (printf "/cache/served/%s" (include "slimpajama.modelFolder" .))) }}
{{- end }}
{{- end }}
{{- toJson $hub }}
{{- end }}

{{- /* How many devices (or processes) decoders are divided over. */ -}}
{{- define "slimpajama.ranks" -}}
{{- int (dig "tensor_parallel_size" (ternary .Values.accelerator.count 1 (eq .Values.accelerator.type "nvidia")) .Values.settings) }}
{{- end }}

{{- /* A served name may hold slashes and dots; a folder or volume made of it may not, and must differ as the names do. */ -}}
{{- define "slimpajama.modelFolder" -}}
{{- $served := printf "%s@%s" .name (default "" .version) }}
{{- printf "%s-%s" (.name | lower | replace "/" "-" | replace "." "-" | replace "_" "-" | trunc 40 | trimSuffix "-") (sha256sum $served | trunc 8) }}
{{- end }}

{{- define "slimpajama.modelLocation" -}}
{{- if .path }}
{{- .path }}
{{- else if .hub }}
{{- printf "/cache/served/%s" (include "slimpajama.modelFolder" .) }}
{{- else }}
{{- $inside := trimAll "/" (default "" (dig "path" "" (default .image .pvc))) }}
{{- printf "/mounted/%s%s" (include "slimpajama.modelFolder" .) (ternary "" (printf "/%s" $inside) (empty $inside)) }}
{{- end }}
{{- end }}

{{- /* What the service reads with --config. Helm's numbers are floats: whole ones are written as such. */ -}}
{{- define "slimpajama.config" -}}
{{- $values := .Values }}
{{- $models := list }}
{{- $adapters := list }}
{{- $drafts := list }}
{{- range $values.models }}
{{- $source := printf "%s=%s%s" (include "slimpajama.modelLocation" .) .name (ternary "" (printf "@%s" .version) (empty .version)) }}
{{- if .draftFor }}
{{- $drafts = append $drafts (printf "%s=%s" (include "slimpajama.modelLocation" .) .draftFor) }}
{{- else if .adapter }}
{{- $adapters = append $adapters $source }}
{{- else }}
{{- $models = append $models $source }}
{{- end }}
{{- end }}
{{- $config := dict "host" $values.server.host "port" (int $values.server.port) "model" $models }}
{{- if $adapters }}
{{- $_ := set $config "adapter" $adapters }}
{{- end }}
{{- if $drafts }}
{{- $_ := set $config "draft" $drafts }}
{{- end }}
{{- $_ := set $config "device" (ternary "cuda" "cpu" (eq $values.accelerator.type "nvidia")) }}
{{- $_ := set $config "drain_timeout" (int $values.lifecycle.drainTimeoutSeconds) }}
{{- $_ := set $config "offline" true }}
{{- if ne (include "slimpajama.hubModels" .) "[]" }}
{{- $_ := set $config "cache_dir" "/cache/huggingface/hub" }}
{{- end }}
{{- if $values.auth.apiKeys.existingSecret }}
{{- $_ := set $config "api_keys_file" (printf "/etc/slimpajama/api-keys/%s" $values.auth.apiKeys.key) }}
{{- end }}
{{- if not $values.auth.enabled }}
{{- $_ := set $config "no_auth" true }}
{{- end }}
{{- if $values.auth.adminKeys.existingSecret }}
{{- $_ := set $config "admin_keys_file" (printf "/etc/slimpajama/admin-keys/%s" $values.auth.adminKeys.key) }}
{{- end }}
{{- if $values.tls.existingSecret }}
{{- $_ := set $config "tls_certificate" "/etc/slimpajama/tls/tls.crt" }}
{{- $_ := set $config "tls_key" "/etc/slimpajama/tls/tls.key" }}
{{- end }}
{{- $ranks := include "slimpajama.ranks" . | int }}
{{- if gt $ranks 1 }}
{{- $_ := set $config "tensor_parallel_size" $ranks }}
{{- end }}
{{- if include "slimpajama.cpus" . }}
{{- $_ := set $config "worker_threads" (max 1 (div (include "slimpajama.cpus" . | int) $ranks)) }}
{{- end }}
{{- range $key, $value := $values.settings }}
{{- if and (kindIs "float64" $value) (eq (float64 (int64 $value)) $value) }}
{{- $_ := set $config $key (int64 $value) }}
{{- else if not (kindIs "invalid" $value) }}
{{- $_ := set $config $key $value }}
{{- end }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- /* By namespace and pod, as the PodMonitor labels series; the pods of a Deployment end with two words of its own. */ -}}
{{- define "slimpajama.seriesSelector" -}}
{{- printf "namespace=%q,pod=~\"%s-[a-z0-9]+-[a-z0-9]+\"" .Release.Namespace (include "slimpajama.fullname" .) }}
{{- end }}

{{- define "slimpajama.leastReplicas" -}}
{{- ternary .Values.replicaCount .Values.autoscaling.minReplicas (eq .Values.autoscaling.engine "none") | int }}
{{- end }}

{{- define "slimpajama.hasBudget" -}}
{{- $mode := .Values.podDisruptionBudget.mode }}
{{- if or (eq $mode "always") (and (eq $mode "auto") (ge (include "slimpajama.leastReplicas" . | int) 2)) }}yes{{ end }}
{{- end }}
