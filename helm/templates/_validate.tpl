{{- /* Combinations that would render, and then not work: refused here, with advice. Each has a failing case in
tests/helm/test_refusals.py. */ -}}
{{- define "slimpajama.validate" -}}
{{- $values := .Values }}
{{- $hasKeys := or $values.auth.apiKeys.existingSecret $values.auth.singleKey.existingSecret }}
{{- if and $values.auth.enabled (not $hasKeys) }}
{{- fail "auth.apiKeys.existingSecret is empty: name a Secret whose file holds lines of name:key (or, with auth.singleKey.existingSecret, one with a single key), or set auth.enabled=false to serve everybody who can reach the service" }}
{{- end }}
{{- if and (not $values.auth.enabled) $hasKeys }}
{{- fail "auth.enabled=false contradicts auth.apiKeys and auth.singleKey: drop one" }}
{{- end }}
{{- $names := list }}
{{- $served := list }}
{{- range $values.models }}
{{- if not .draftFor }}{{ $served = append $served .name }}{{ end }}
{{- end }}
{{- range $values.models }}
{{- $model := . }}
{{- $sources := list }}
{{- range list "path" "hub" "pvc" "image" }}
{{- if hasKey $model . }}{{ $sources = append $sources . }}{{ end }}
{{- end }}
{{- if ne (len $sources) 1 }}
{{- fail (printf "models: %s has %d sources (%s); give exactly one of path, hub, pvc, image" .name (len $sources) (join ", " $sources)) }}
{{- end }}
{{- $entry := printf "%s@%s" .name (default "" .version) }}
{{- if has $entry $names }}
{{- fail (printf "models: the name %s is given twice; tell them apart by name or version" .name) }}
{{- end }}
{{- $names = append $names $entry }}
{{- if and .adapter (gt (include "slimpajama.ranks" $ | int) 1) }}
{{- fail (printf "models: %s is an adapter, which cannot share a base that is divided over %s devices: leave adapter out, and it is merged" .name (include "slimpajama.ranks" $)) }}
{{- end }}
{{- if and .draftFor (not (has .draftFor $served)) }}
{{- fail (printf "models: %s is the draft of %s, which is no other entry" .name .draftFor) }}
{{- end }}
{{- if and .draftFor (or (eq $.Values.accelerator.type "nvidia") (gt (include "slimpajama.ranks" $ | int) 1)) }}
{{- fail (printf "models: %s is a draft, which guesses on CPUs alone and for what is not divided over devices: leave it out" .name) }}
{{- end }}
{{- if and .image (semverCompare "<1.35.0-0" $.Capabilities.KubeVersion.Version) }}
{{- fail (printf "models: %s is an image volume, which needs Kubernetes 1.35 or later (this is %s); use pvc or hub" .name $.Capabilities.KubeVersion.Version) }}
{{- end }}
{{- end }}
{{- $shortest := include "slimpajama.shortestGrace" . | int }}
{{- $grace := int $values.lifecycle.terminationGracePeriodSeconds }}
{{- if and $grace (lt $grace $shortest) }}
{{- fail (printf "lifecycle.terminationGracePeriodSeconds is %d, less than preStop %d + drain %d + 15 = %d: accepted requests would be killed; set 0 to derive it" $grace (int $values.lifecycle.preStopSleepSeconds) (int $values.lifecycle.drainTimeoutSeconds) $shortest) }}
{{- end }}
{{- if ne $values.autoscaling.engine "none" }}
{{- if gt (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas (%d) is more than autoscaling.maxReplicas (%d)" (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas)) }}
{{- end }}
{{- if eq (int $values.autoscaling.minReplicas) 0 }}
{{- fail "autoscaling.minReplicas is 0: what scales are gauges of running pods, so that nothing would start the first again; 1 at least" }}
{{- end }}
{{- end }}
{{- if and (eq $values.podDisruptionBudget.mode "always") (lt (include "slimpajama.leastReplicas" . | int) 2) }}
{{- fail "podDisruptionBudget.mode=always with fewer than two replicas: no node could ever be drained; add a replica or use auto" }}
{{- end }}
{{- if and (include "slimpajama.hasBudget" .) (eq (toString $values.podDisruptionBudget.maxUnavailable) "0" "0%") }}
{{- fail "podDisruptionBudget.maxUnavailable is 0: no node could ever be drained; 1 at least, or mode=never" }}
{{- end }}
{{- if and (eq (toString $values.strategy.maxSurge) "0" "0%") (eq (toString $values.strategy.maxUnavailable) "0" "0%") }}
{{- fail "strategy.maxSurge and strategy.maxUnavailable are both 0: a roll-out could never begin" }}
{{- end }}
{{- $claim := and $values.modelCache.persistent (has "ReadWriteOncePod" $values.modelCache.accessModes) }}
{{- if and $claim (ne (include "slimpajama.hubModels" .) "[]") (ne (toString $values.strategy.maxSurge) "0") }}
{{- fail "modelCache.accessModes is ReadWriteOncePod: a roll-out's second pod could not start; set strategy.maxSurge=0 and strategy.maxUnavailable=1, or use ReadWriteMany" }}
{{- end }}
{{- if and $claim (ne (include "slimpajama.hubModels" .) "[]") (gt (include "slimpajama.leastReplicas" . | int) 1) }}
{{- fail "modelCache.accessModes is ReadWriteOncePod with several replicas: only one pod may have the claim; use ReadWriteMany" }}
{{- end }}
{{- $selector := include "slimpajama.selectorLabels" . | fromYaml }}
{{- range $label := concat (keys (default dict $values.podLabels)) (keys (default dict $values.commonLabels)) }}
{{- if hasKey $selector $label }}
{{- fail (printf "podLabels and commonLabels cannot hold %s: pods are found by it; nameOverride and the release's name say what it is" $label) }}
{{- end }}
{{- end }}
{{- $derived := list "config" "host" "port" "tls_certificate" "tls_key" "model" "adapter" "draft" "revision" "offline" "cache_dir" "device" "drain_timeout" "api_keys_file" "api_key" "admin_keys_file" "no_auth" }}
{{- range $values.extraEnv }}
{{- if and (hasPrefix "slimpajama_" (lower .name)) (has (lower .name | trimPrefix "slimpajama_") $derived) }}
{{- fail (printf "extraEnv: %s would contradict what the chart derives from other values (probes, ports, grace, mounts); set those" .name) }}
{{- end }}
{{- end }}
{{- if and $values.ingress.enabled (empty $values.ingress.hosts) }}
{{- fail "ingress.enabled without ingress.hosts: name at least one host" }}
{{- end }}
{{- if and $values.httpRoute.enabled (empty $values.httpRoute.parentRefs) }}
{{- fail "httpRoute.enabled without httpRoute.parentRefs: name the gateway it belongs to" }}
{{- end }}
{{- if $values.inferencePool.enabled }}
{{- if empty $values.inferencePool.endpointPicker.name }}
{{- fail "inferencePool.enabled without inferencePool.endpointPicker.name: name the endpoint picker's Service" }}
{{- end }}
{{- if $values.tls.existingSecret }}
{{- fail "inferencePool.enabled with tls.existingSecret: the endpoint picker reads /metrics by plain HTTP; end TLS at the gateway" }}
{{- end }}
{{- if not $values.settings.metrics_public }}
{{- fail "inferencePool.enabled with settings.metrics_public=false: the endpoint picker has no key for /metrics" }}
{{- end }}
{{- end }}
{{- if and $values.metrics.podMonitor.enabled (not $values.settings.metrics_public) (empty $values.metrics.podMonitor.keySecret.name) }}
{{- fail "metrics.podMonitor.enabled with settings.metrics_public=false: name a Secret with a key in metrics.podMonitor.keySecret.name" }}
{{- end }}
{{- if and $values.networkPolicy.enabled (dig "otlp_endpoint" "" $values.settings) (empty $values.networkPolicy.egress) }}
{{- fail "settings.otlp_endpoint with networkPolicy.enabled: let traces out to the collector by a rule of networkPolicy.egress" }}
{{- end }}
{{- if and (eq $values.accelerator.type "nvidia") (gt (int (dig "tensor_parallel_size" 1 $values.settings)) (int $values.accelerator.count)) }}
{{- fail (printf "settings.tensor_parallel_size is %d with %d GPUs: raise accelerator.count, and leave the setting out: it follows" (int $values.settings.tensor_parallel_size) (int $values.accelerator.count)) }}
{{- end }}
{{- if and (eq $values.accelerator.type "nvidia") (contains "/mig-" $values.accelerator.resourceName) (gt (int $values.accelerator.count) 1) }}
{{- fail "accelerator.count above 1 with slices of a GPU (MIG): a process can use one slice only; raise replicaCount instead" }}
{{- end }}
{{- if and (eq $values.accelerator.type "none") $values.accelerator.runtimeClassName }}
{{- fail "accelerator.runtimeClassName without accelerator.type=nvidia: no GPU is requested" }}
{{- end }}
{{- if or (hasKey (default dict $values.resources.limits) $values.accelerator.resourceName) (hasKey (default dict $values.resources.requests) $values.accelerator.resourceName) }}
{{- fail (printf "resources holds %s: GPUs are requested by accelerator.type and accelerator.count" $values.accelerator.resourceName) }}
{{- end }}
{{- end }}
