{{- define "tuneyard.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "tuneyard.selector" -}}
app.kubernetes.io/name: tuneyard
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "tuneyard.labels" -}}
{{ include "tuneyard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "tuneyard.serviceAccount" -}}
{{- default (ternary (include "tuneyard.name" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "tuneyard.lease" -}}
{{ include "tuneyard.name" . }}-operator
{{- end }}

{{- define "tuneyard.tlsSecret" -}}
{{ include "tuneyard.name" . }}-tls
{{- end }}

{{- define "tuneyard.metadata" -}}
name: {{ include "tuneyard.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "tuneyard.labels" . | nindent 2 }}
{{- end }}

{{- define "tuneyard.subject" -}}
- kind: ServiceAccount
  name: {{ include "tuneyard.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}
