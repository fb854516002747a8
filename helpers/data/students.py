"""The columns of the students' table and what they mean, from the description of its makers.

References
----------
.. [1] V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021). *Predict Students'
   Dropout and Academic Success*. UCI Machine Learning Repository. doi:10.24432/C5MC89
   (CC BY 4.0).
.. [2] V. Realinho, J. Machado, L. Baptista, M. V. Martins (2022). *Predicting Student Dropout
   and Academic Success*. Data 7(11), 146. doi:10.3390/data7110146
"""

STUDENT_CATEGORICAL = (
    "Marital status",
    "Application mode",
    "Course",
    "Previous qualification",
    "Nacionality",
    "Mother's qualification",
    "Father's qualification",
    "Mother's occupation",
    "Father's occupation",
)

# The Kaggle variant numbers the codes of a column 1, 2, 3, … in the order of UCI's codes.
_QUALIFICATION = (
    "code of the highest level of education: 1 secondary, 2 to 5 bachelor, degree, master and "
    "doctorate, higher ones years of school and technical courses"
)
_OCCUPATION = (
    "code of the Portuguese classification of professions: its ten groups from managers to "
    "unskilled work and the armed forces (UCI 0 is student), three digits for groups inside them"
)
_SEMESTER = {
    "credited": "course units of the {} semester recognised from earlier studies, their number",
    "enrolled": "course units of the {} semester the student enrolled in, their number",
    "evaluations": "evaluations taken in course units of the {} semester, their number",
    "approved": "course units of the {} semester that were passed, their number",
    "grade": "mean grade of the {} semester, 0 to 20; 0 where no unit was passed",
    "without evaluations": "course units of the {} semester without any evaluation, their number",
}


def _semester(number, ordinal):
    return {
        f"Curricular units {number} sem ({what})": meaning.format(ordinal)
        for what, meaning in _SEMESTER.items()
    }


# In UCI's order; the Kaggle variant has no grade of admission or of the previous qualification.
STUDENT_COLUMNS = {
    "Marital status": "code: 1 single, 2 married, 3 widowed, 4 divorced, 5 de facto union, "
    "6 legally separated",
    "Application mode": "code of the way of admission: general contingents (UCI 1, 17, 18 for "
    "phases 1 to 3), over 23 years old (39), change of course (43), transfer (42), others",
    "Application order": "rank of this course among the student's choices, 0 (first) to 9",
    "Course": "code of the degree, such as nursing (UCI 9500), management (9147), tourism (9254), "
    "informatics engineering (9119)",
    "Daytime/evening attendance": "1 daytime, 0 evening",
    "Previous qualification": f"{_QUALIFICATION}; of the student before admission",
    "Previous qualification (grade)": "grade of the previous qualification, 0 to 200",
    "Nacionality": "code of the nationality: 1 Portuguese, others such as Brazilian (UCI 41)",
    "Mother's qualification": f"{_QUALIFICATION}; of the mother",
    "Father's qualification": f"{_QUALIFICATION}; of the father",
    "Mother's occupation": f"{_OCCUPATION}; of the mother",
    "Father's occupation": f"{_OCCUPATION}; of the father",
    "Admission grade": "grade of admission, 0 to 200",
    "Displaced": "1 lives away from home, 0 does not",
    "Educational special needs": "1 has special needs, 0 has none",
    "Debtor": "1 owes money to the institution, 0 does not",
    "Tuition fees up to date": "1 has paid all fees so far, 0 has not",
    "Gender": "1 male, 0 female",
    "Scholarship holder": "1 has a scholarship, 0 has none",
    "Age at enrollment": "age in years",
    "International": "1 international student, 0 not",
    **_semester("1st", "first"),
    **_semester("2nd", "second"),
    "Unemployment rate": "unemployment in Portugal in the year of enrolment, %",
    "Inflation rate": "inflation in Portugal in the year of enrolment, %",
    "GDP": "growth of the gross domestic product in the year of enrolment, %",
    "Target": "where the student stood at the end of the normal length of the course: Dropout, "
    "Enrolled (still studying) or Graduate",
}
