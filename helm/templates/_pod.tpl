{{- /* The pod: what Deployment and any later kind of it share. */ -}}
{{- define "slimpajama.podSpec" -}}
{{- $values := .Values }}
{{- $fullname := include "slimpajama.fullname" . }}
{{- $hubModels := include "slimpajama.hubModels" . }}
{{- $usesHub := ne $hubModels "[]" }}
{{- $nvidia := eq $values.accelerator.type "nvidia" }}
serviceAccountName: {{ include "slimpajama.serviceAccountName" . }}
automountServiceAccountToken: false
# Service links are variables like SLIMPAJAMA_PORT, beside our settings' own.
enableServiceLinks: false
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with $values.accelerator.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
# preStop {{ $values.lifecycle.preStopSleepSeconds }} + drain {{ $values.lifecycle.drainTimeoutSeconds }} + 15 = {{ include "slimpajama.shortestGrace" . }} at least.
terminationGracePeriodSeconds: {{ default (include "slimpajama.shortestGrace" . | int) (int $values.lifecycle.terminationGracePeriodSeconds) }}
{{- if or $usesHub $values.extraInitContainers }}
initContainers:
{{- end }}
{{- if $usesHub }}
  - name: download
    image: {{ include "slimpajama.image" . }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    command: [python, /etc/slimpajama/scripts/fetch_models.py]
    env:
      - name: FETCH_MODELS
        value: {{ $hubModels | quote }}
      - name: HF_HOME
        value: /cache/huggingface
      {{- with $values.hub.endpoint }}
      - name: HF_ENDPOINT
        value: {{ . | quote }}
      {{- end }}
      {{- if $values.hub.tokenSecret.name }}
      - name: HF_TOKEN
        valueFrom:
          secretKeyRef:
            name: {{ $values.hub.tokenSecret.name }}
            key: {{ $values.hub.tokenSecret.key }}
      {{- end }}
    securityContext:
      {{- toYaml $values.securityContext | nindent 6 }}
    resources:
      {{- toYaml $values.hub.resources | nindent 6 }}
    volumeMounts:
      - {name: scripts, mountPath: /etc/slimpajama/scripts, readOnly: true}
      - {name: model-cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- with $values.extraInitContainers }}
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: slimpajama
    image: {{ include "slimpajama.image" . }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args: [--config, /etc/slimpajama/config/service.yaml]
    {{- if or $values.auth.singleKey.existingSecret $values.extraEnv }}
    env:
      {{- with $values.auth.singleKey.existingSecret }}
      - name: SLIMPAJAMA_API_KEY
        valueFrom:
          secretKeyRef: {name: {{ . }}, key: {{ $values.auth.singleKey.key }}}
      {{- end }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
    ports:
      - {name: http, containerPort: {{ $values.server.port }}, protocol: TCP}
    securityContext:
      {{- toYaml $values.securityContext | nindent 6 }}
    {{- /* A GPU's request must equal its limit. */}}
    {{- $resources := deepCopy $values.resources }}
    {{- if $nvidia }}
    {{- $gpus := dict $values.accelerator.resourceName ($values.accelerator.count | toString) }}
    {{- $_ := set $resources "limits" (merge (default dict $resources.limits) $gpus) }}
    {{- $_ := set $resources "requests" (merge (default dict $resources.requests) $gpus) }}
    {{- end }}
    resources:
      {{- toYaml $resources | nindent 6 }}
    {{- range $probe, $path := dict "startup" "/startupz" "readiness" "/readyz" "liveness" "/livez" }}
    {{ $probe }}Probe:
      httpGet: {path: {{ $path }}, port: http, scheme: {{ include "slimpajama.scheme" $ }}}
      {{- $numbers := get $values.probes $probe }}
      periodSeconds: {{ $numbers.periodSeconds }}
      timeoutSeconds: {{ $numbers.timeoutSeconds }}
      failureThreshold: {{ $numbers.failureThreshold }}
    {{- end }}
    {{- if $values.lifecycle.preStopSleepSeconds }}
    lifecycle:
      # SIGTERM comes after it; until then new requests are served on, from proxies that have not heard yet.
      preStop: {sleep: {seconds: {{ $values.lifecycle.preStopSleepSeconds }}}}
    {{- end }}
    volumeMounts:
      - {name: config, mountPath: /etc/slimpajama/config, readOnly: true}
      {{- if $values.auth.apiKeys.existingSecret }}
      - {name: api-keys, mountPath: /etc/slimpajama/api-keys, readOnly: true}
      {{- end }}
      {{- if $values.auth.adminKeys.existingSecret }}
      - {name: admin-keys, mountPath: /etc/slimpajama/admin-keys, readOnly: true}
      {{- end }}
      {{- if $values.tls.existingSecret }}
      - {name: tls, mountPath: /etc/slimpajama/tls, readOnly: true}
      {{- end }}
      {{- if $usesHub }}
      - {name: model-cache, mountPath: /cache, readOnly: true}
      {{- end }}
      {{- range $values.models }}
      {{- if or .pvc .image }}
      - {name: "model-{{ include "slimpajama.modelFolder" . }}", mountPath: "/mounted/{{ include "slimpajama.modelFolder" . }}", readOnly: true}
      {{- end }}
      {{- end }}
      - {name: tmp, mountPath: /tmp}
      - {name: shared-memory, mountPath: /dev/shm}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- with $values.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  - name: config
    configMap: {name: {{ $fullname }}, items: [{key: service.yaml, path: service.yaml}]}
  {{- if $usesHub }}
  - name: scripts
    configMap: {name: {{ $fullname }}, items: [{key: fetch_models.py, path: fetch_models.py}]}
  - name: model-cache
    {{- if $values.modelCache.persistent }}
    persistentVolumeClaim: {claimName: {{ default (printf "%s-models" $fullname) $values.modelCache.existingClaim }}}
    {{- else }}
    emptyDir: {sizeLimit: {{ $values.modelCache.size }}}
    {{- end }}
  {{- end }}
  {{- with $values.auth.apiKeys.existingSecret }}
  - name: api-keys
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- with $values.auth.adminKeys.existingSecret }}
  - name: admin-keys
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- with $values.tls.existingSecret }}
  - name: tls
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- range $values.models }}
  {{- if .pvc }}
  - name: model-{{ include "slimpajama.modelFolder" . }}
    persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
  {{- else if .image }}
  - name: model-{{ include "slimpajama.modelFolder" . }}
    image: {reference: {{ .image.reference | quote }}, pullPolicy: {{ default "IfNotPresent" .image.pullPolicy }}}
  {{- end }}
  {{- end }}
  - name: tmp
    emptyDir: {sizeLimit: {{ $values.temporary.size }}}
  - name: shared-memory
    emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory.size }}}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := $values.tolerations }}
{{- if $nvidia }}
{{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if kindIs "invalid" $values.topologySpreadConstraints }}
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "slimpajama.selectorLabels" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
  {{- else }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- end }}
{{- end }}
