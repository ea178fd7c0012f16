{{- define "trunkline.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end -}}

{{/* What a selector has; a component is added by who uses it. */}}
{{- define "trunkline.selector" -}}
app.kubernetes.io/name: trunkline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "trunkline.labels" -}}
{{ include "trunkline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "trunkline.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Where functions without a socket ask. They do not speak TLS. */}}
{{- define "trunkline.url" -}}
{{- if and .Values.http.enabled (not .Values.http.tlsSecret) -}}
http://{{ include "trunkline.name" . }}.{{ .Release.Namespace }}.svc:{{ .Values.http.port }}
{{- end -}}
{{- end -}}

{{/* The namespaces of functions, as a selector. */}}
{{- define "trunkline.namespaces" -}}
matchExpressions:
  - key: kubernetes.io/metadata.name
    operator: NotIn
    values: [kube-system, {{ .Release.Namespace | quote }}]
{{- with .Values.functions.namespaceLabels }}
matchLabels:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Memory of the host for weights, in MiB: with a GPU, the cache, and what they are copied through. */}}
{{- define "trunkline.hostMiB" -}}
{{- if .Values.gpu.enabled -}}
{{ add (int64 .Values.memory.hostMiB) 64 }}
{{- else -}}
{{ int64 .Values.memory.weightsMiB }}
{{- end -}}
{{- end -}}

{{/* What every container of ours has. */}}
{{- define "trunkline.container" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What every pod of ours has, but for those of whom the kubelet's folders demand root. */}}
{{- define "trunkline.pod" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- with include "trunkline.seLinux" . }}
{{ . }}
{{- end }}
{{- end -}}

{{/* What a pod has that connects to the socket or gives it on. */}}
{{- define "trunkline.seLinux" -}}
{{- with .Values.seLinuxOptions -}}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Where pods of a DaemonSet run: the sidecar's, and of what gives its socket to functions. */}}
{{- define "trunkline.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The memory limit of the sidecar's container, in MiB. */}}
{{- define "trunkline.limitMiB" -}}
{{- $memory := .Values.memory -}}
{{ add (include "trunkline.hostMiB" .) (int64 $memory.activationsMiB) (int64 $memory.arenasMiB) (int64 $memory.processesMiB) }}
{{- end -}}

{{/* A value of a setting. Large integers would be written as 1e+06. */}}
{{- define "trunkline.setting" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ int64 . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end -}}
